"""Options of the ``trainer`` node, and checks of their values that need neither torch nor Lightning."""

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from cpm_rcnn.cli.config import config_keys, to_dict
from cpm_rcnn.errors import ArgumentError, shown
from cpm_rcnn.settings import Settings, choice, flag, integer, number, optional, text, training


def _is_devices(argument: str, value: Any) -> None:
    items = value if isinstance(value, (list, tuple)) and value else [value]
    one = items is not value
    if one and (value in ("auto", -1) or re.fullmatch(r"[1-9]\d*|\d+(,\d+)+", value if isinstance(value, str) else "")):
        return
    low = 1 if one else 0
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= low for item in items):
        raise ArgumentError(
            argument, f"={shown(value)}: must be a number of devices, a list of numbers of GPUs, -1 (all GPUs), or auto"
        )


def _is_limit(argument: str, value: Any) -> None:
    """A number of batches, or a fraction of them. Without a batch there are no metrics."""
    if isinstance(value, float) and 0 < value <= 1:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(
            argument, f"={shown(value)}: must be a number of batches, a fraction of them such as 0.5, or null (all)"
        )


def _is_fast_dev_run(argument: str, value: Any) -> None:
    if not isinstance(value, int) or value < 0:
        raise ArgumentError(argument, f"={shown(value)}: must be true, false, or a number of batches")


def _is_compile(argument: str, value: Any) -> None:
    if value not in ("off", "reduce-overhead", "max"):
        quotes = '; in a YAML file, "off" needs its quotes' if value is False else ""
        raise ArgumentError(argument, f"={shown(value)}: must be off, reduce-overhead or max{quotes}")


@dataclass(frozen=True)
class TrainerOptions(Settings):
    """The options of conf/trainer. Others can be added, as arguments of Lightning's Trainer, which checks those.

    ``precision`` has no value with which box arithmetic fails or training diverges. ``compile`` is ours
    (:func:`cpm_rcnn.models.compiled.compile_layers`); all others are arguments of Lightning's Trainer.

    Attributes:
        accelerator: kind of device; ``auto`` takes a GPU if there is one.
        devices: how many devices of each machine, or which.
        num_nodes: number of machines.
        strategy: how several devices work together; ``auto`` is ``ddp`` for more than one.
        precision: number format of weights and layers. With ``bf16-mixed`` and ``16-mixed``, weights, box arithmetic
            and losses are float32.
        gradient_clip_val: maximum norm of the gradients of a step; None does not limit it.
        accumulate_grad_batches: number of batches whose gradients make one step.
        log_every_n_steps: steps between two rows of ``metrics.csv``.
        limit_val_batches: number or part of the batches that a validation uses; None uses all.
        limit_test_batches: number or part of the batches that a test uses; None uses all.
        fast_dev_run: try the program with one batch, or with this many, without checkpoints and loggers.
        benchmark: let cuDNN try its algorithms for each new size of the input.
        deterministic: use only algorithms whose results do not vary; ``warn`` warns where there is none.
        compile: ``torch.compile`` of the layers in training.
    """

    accelerator: str = training("auto", check=choice("auto", "cpu", "gpu", "cuda", "mps"))
    devices: Any = training(1, check=_is_devices)
    num_nodes: int = training(1, check=integer())
    strategy: str = training("auto", check=text)
    precision: Any = training("32-true", check=choice("32-true", "bf16-mixed", "16-mixed", "bf16-true", 32, 16, "bf16"))
    gradient_clip_val: float | None = training(None, check=optional(number(0)))
    accumulate_grad_batches: int = training(1, check=integer())
    log_every_n_steps: int = training(20, check=integer(0))
    limit_val_batches: float | None = training(None, check=optional(_is_limit))
    limit_test_batches: float | None = training(None, check=optional(_is_limit))
    fast_dev_run: bool | int | None = training(False, check=optional(_is_fast_dev_run))
    benchmark: bool | None = training(False, check=optional(flag))
    deterministic: Any = training(False, check=optional(choice(True, False, "warn")))
    compile: Any = training("off", check=_is_compile)


def check_trainer_options(config: DictConfig) -> TrainerOptions:
    """The options of ``trainer``; those that :class:`TrainerOptions` does not have are left to Lightning.

    Raises:
        UserError: a value is invalid.
    """
    values = {name: value for name, value in to_dict(config.trainer).items() if name in TrainerOptions.names()}
    with config_keys(config, "trainer"):
        return TrainerOptions.from_dict(values)
