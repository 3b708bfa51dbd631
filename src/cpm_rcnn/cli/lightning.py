"""Devices for Lightning's Trainer, and its own errors about its arguments."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hydra.errors import InstantiationException
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from cpm_rcnn.cli.config import to_dict
from cpm_rcnn.cli.trainer_options import check_trainer_options
from cpm_rcnn.errors import UserError, shown

# Errors of Lightning about the arguments of a Trainer.
_LIGHTNING_ERRORS = (TypeError, ValueError, ImportError, MisconfigurationException)


def check_trainer(config: DictConfig) -> None:
    """Check the options of ``trainer``, and that the machine has the devices, before a process is started for each.

    Raises:
        UserError: a value is invalid; there are fewer GPUs than devices; or no GPU, and the CPU was not asked for.
    """
    options = check_trainer_options(config)
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


def process_count(config: DictConfig) -> int:
    """The number of processes of a training, one for each device.

    Raises:
        UserError: as :func:`check_trainer`.
    """
    check_trainer(config)
    options = check_trainer_options(config)
    devices = options.devices
    if devices in ("auto", -1):
        count = 1 if options.accelerator == "cpu" else max(1, torch.cuda.device_count())
    elif isinstance(devices, str):
        # "0,1" are two GPUs by their numbers, and "2" is a number of devices.
        count = len(devices.split(",")) if "," in devices else int(devices)
    else:
        count = devices if isinstance(devices, int) else len(devices)
    return count * options.num_nodes


def uses_gpu(config: DictConfig) -> bool:
    """Whether a training uses an accelerator of this machine and not its CPU."""
    accelerator = check_trainer_options(config).accelerator
    return accelerator != "cpu" and (torch.cuda.is_available() or torch.backends.mps.is_available())


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
