"""The training schedule: learning rate, number of steps, settings of the optimizer (docs/method.md section 8)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpm_rcnn.errors import ArgumentError, check_count, check_list, shown
from cpm_rcnn.settings import Settings, choice, integer, number, optional, training


def _is_milestones(argument: str, value: Any) -> None:
    check_list(argument, value)
    for milestone in value:
        check_count(argument, milestone, 0)
    if list(value) != sorted(value):
        raise ArgumentError(argument, f"={list(value)}: must be in ascending order")


def _is_epochs(argument: str, value: Any) -> None:
    if value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ArgumentError(argument, f"={shown(value)}: must be a number above 0, auto, or null")


@dataclass(frozen=True)
class Schedule(Settings):
    """Settings of the training schedule; the defaults are the paper's 2x schedule.

    Attributes:
        epochs: passes over the training images, or ``auto`` for a number that fits the number of images. The ``train``
            command computes ``max_steps``, ``milestones``, ``warmup_steps`` and ``val_interval`` from it. None leaves
            these as they are.
        max_steps: number of optimizer steps.
        milestones: steps, in ascending order, at which the learning rate is multiplied by ``gamma``.
        base_lr: learning rate for 16 images per step; it scales linearly with the number of images per step.
        gamma: factor of the learning rate at each milestone.
        warmup_steps: number of steps of linear warm-up.
        warmup_factor: fraction of the learning rate at which the warm-up starts.
        optimizer: ``sgd`` (the paper's) or ``adamw``.
        momentum: SGD momentum.
        weight_decay: weight decay of the weights; biases and norm layers have none.
        bias_lr_factor: factor of the learning rate of biases.
        images_per_device: images per step and device.
        val_interval: number of optimizer steps between two validations.
    """

    epochs: float | str | None = training(None, check=optional(_is_epochs))
    max_steps: int = training(180000, check=integer())
    milestones: Sequence[int] = training((120000, 160000), check=_is_milestones)
    base_lr: float = training(0.02, check=number(0))
    gamma: float = training(0.1, check=number(0, 1))
    warmup_steps: int = training(500, check=integer(0))
    warmup_factor: float = training(0.1, check=number(0, 1))
    optimizer: str = training("sgd", check=choice("sgd", "adamw"))
    momentum: float = training(0.9, check=number(0, 1))
    weight_decay: float = training(1e-4, check=number(0))
    bias_lr_factor: float = training(2.0, check=number(0))
    images_per_device: int = training(2, check=integer())
    val_interval: int = training(10000, check=integer())

    def rate_factor(self, step: int) -> float:
        """The factor of the learning rate at ``step``, counted from 0."""
        drops = self.gamma ** sum(step >= milestone for milestone in self.milestones)
        if step >= self.warmup_steps:
            return drops
        progress = step / self.warmup_steps
        return drops * (self.warmup_factor * (1 - progress) + progress)
