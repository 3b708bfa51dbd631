"""Options of the ``trainer`` node: checks of their values, and Lightning's own errors about them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from cpm_rcnn.cli.config import config_keys, to_dict
from cpm_rcnn.errors import ArgumentError, UserError, shown
from cpm_rcnn.settings import Settings, choice, flag, integer, number, optional, text, training

# Errors of Lightning about the arguments of a Trainer.
_LIGHTNING_ERRORS = (TypeError, ValueError, ImportError, MisconfigurationException)


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


@dataclass(frozen=True)
class TrainerOptions(Settings):
    """The options of conf/trainer, arguments of Lightning's Trainer. Others can be added; Lightning checks those.

    ``precision`` has no value with which box arithmetic fails or training diverges.
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


def check_trainer(config: DictConfig) -> None:
    """Check the options of ``trainer``, and that the machine has the devices, before a process is started for each.

    Raises:
        UserError: a value is invalid; there are fewer GPUs than devices; or no GPU, and the CPU was not asked for.
    """
    values = {name: value for name, value in to_dict(config.trainer).items() if name in TrainerOptions.names()}
    with config_keys(config, "trainer"):
        options = TrainerOptions.from_dict(values)
    accelerator, devices = options.accelerator, options.devices
    found = torch.cuda.device_count()
    mps = torch.backends.mps.is_available()
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not found and not mps)
    if on_cpu and (devices == -1 or isinstance(devices, tuple) or "," in str(devices)):
        raise UserError(f"trainer.devices={shown(devices)}: must be a number of processes on the CPU, at least 1")
    if accelerator == "cpu" or mps:
        return
    wanted = int(devices) if re.fullmatch(r"\d+", str(devices)) else 1
    if 2 <= wanted > found:
        has = "no GPU" if found == 0 else f"{found} GPU{'s' if found > 1 else ''}"
        raise UserError(
            f"trainer.devices={wanted}: this machine has {has}; trainer=cpu trainer.devices={wanted} uses the CPU"
        )
    if accelerator != "auto" and not found:
        raise UserError(f"trainer.accelerator={accelerator}: this machine has no such device; trainer=cpu uses the CPU")


@contextmanager
def lightning_errors(config: DictConfig) -> Iterator[None]:
    """Name the config key in Lightning's errors about the arguments of its Trainer.

    Raises:
        UserError: in place of such an error.
    """
    try:
        yield
    except (InstantiationException, MisconfigurationException) as error:
        reason = error.__cause__ if isinstance(error, InstantiationException) else error
        if not isinstance(reason, _LIGHTNING_ERRORS):
            raise
        values = to_dict(config.trainer)
        message = str(reason)
        named = (re.search(rf"\b{re.escape(name)}\b", message, re.IGNORECASE) for name in values)
        first = min((match for match in named if match), key=lambda match: match.start(), default=None)
        if first is None and reason is error:
            raise
        name = "" if first is None else first[0].lower()
        key = f"trainer.{name}={shown(values[name])}" if name else "trainer"
        raise UserError(f"{key}: {message}") from error
