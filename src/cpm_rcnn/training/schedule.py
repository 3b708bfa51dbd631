"""The training recipe: optimizer groups, warm-up and steps (spec section 8)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cpm_rcnn.errors import UserError, check_choice, check_count, check_list, check_range

# The batch that ``base_lr`` is meant for: 8 GPUs with 2 images each.
REFERENCE_BATCH = 16


@dataclass(frozen=True)
class Schedule:
    """A training recipe.

    Attributes:
        max_steps: steps of the run.
        milestones: steps at which the rate drops.
        base_lr: learning rate for 16 images a step; it scales linearly with the batch.
        gamma: factor of each drop.
        warmup_steps: steps of linear warm-up.
        warmup_factor: share of the rate that the warm-up starts from.
        optimizer: ``sgd`` (the paper's) or ``adamw``.
        momentum: of SGD.
        weight_decay: on weights; none on biases and norm layers.
        bias_lr_factor: factor of the biases' learning rate.

    Raises:
        UserError: a value out of range.
    """

    max_steps: int
    milestones: Sequence[int]
    base_lr: float = 0.02
    gamma: float = 0.1
    warmup_steps: int = 500
    warmup_factor: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bias_lr_factor: float = 2.0

    def __post_init__(self) -> None:
        check_count("schedule.max_steps", self.max_steps)
        check_range("schedule.base_lr", self.base_lr, 0)
        check_range("schedule.gamma", self.gamma, 0, 1)
        check_count("schedule.warmup_steps", self.warmup_steps, 0)
        check_range("schedule.warmup_factor", self.warmup_factor, 0, 1)
        check_choice("schedule.optimizer", self.optimizer, ("sgd", "adamw"))
        check_range("schedule.momentum", self.momentum, 0, 1)
        check_range("schedule.weight_decay", self.weight_decay, 0)
        check_range("schedule.bias_lr_factor", self.bias_lr_factor, 0)
        check_list("schedule.milestones", self.milestones)
        for milestone in self.milestones:
            check_count("schedule.milestones", milestone, 0)
        if list(self.milestones) != sorted(self.milestones):
            raise UserError(f"schedule.milestones={list(self.milestones)}: must ascend")

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at ``step`` (0 = the first)."""
        drops = self.gamma ** sum(step >= milestone for milestone in self.milestones)
        if step >= self.warmup_steps:
            return drops
        progress = step / self.warmup_steps
        return drops * (self.warmup_factor * (1 - progress) + progress)

    def optimizer_for(self, module: nn.Module, images_per_step: int) -> torch.optim.Optimizer:
        """The optimizer of ``module``'s parameters that want a gradient.

        Args:
            module: the detector.
            images_per_step: over all processes and accumulated batches; scales the rate.
        """
        lr = self.base_lr * images_per_step / REFERENCE_BATCH
        groups = parameter_groups(module, lr, self.weight_decay, self.bias_lr_factor)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=lr)
        return torch.optim.SGD(groups, lr=lr, momentum=self.momentum)


def parameter_groups(module: nn.Module, lr: float, weight_decay: float, bias_lr_factor: float) -> list[dict]:
    """What wants a gradient, in three groups: weights, norm weights (no decay), biases (no decay, own rate)."""
    weights, norms, biases = [], [], []
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias":
                biases.append(parameter)
            elif isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
                norms.append(parameter)
            else:
                weights.append(parameter)
    groups = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": norms, "lr": lr, "weight_decay": 0.0},
        {"params": biases, "lr": lr * bias_lr_factor, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
