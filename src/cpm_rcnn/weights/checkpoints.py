"""Checkpoint files; nothing in them is unpickled but tensors and plain values."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from cpm_rcnn.errors import UserError
from cpm_rcnn.weights.files import named_tensors, read_file

# What ``DetectionModule`` stores of itself.
_HYPERPARAMETERS = {"model": dict, "categories": list, "schedule": dict, "data": dict}


def read_checkpoint(path: str | Path, key: str = "ckpt") -> dict[str, Any]:
    """A checkpoint of ``train`` or ``convert``.

    It has ``hyper_parameters`` (arguments of ``DetectionModule``), ``state_dict``, and of ``train`` Lightning's rest.

    Args:
        path: the file.
        key: the config key that named it, for messages.

    Raises:
        UserError: no such file, a damaged file, or a checkpoint of another program.
    """
    checkpoint = read_file(path, key)
    known = isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict)
    arguments = checkpoint.get("hyper_parameters") if known else None
    if not isinstance(arguments, dict) or not set(arguments) >= set(_HYPERPARAMETERS):
        raise UserError(f"{key}={path}: not a checkpoint of cpm_rcnn.train; released weights: cpm_rcnn.convert")
    for name, kind in _HYPERPARAMETERS.items():
        if not isinstance(arguments[name], kind):
            raise UserError(f"{key}={path}: its {name} is a {type(arguments[name]).__name__}; damaged")
    if not isinstance(arguments["model"].get("backbone"), dict):
        raise UserError(f"{key}={path}: its model has no backbone; damaged")
    named_tensors(checkpoint["state_dict"], f"{key}={path}")
    return checkpoint


def write_checkpoint(path: Path, weights: Mapping[str, Tensor], hyper_parameters: Mapping[str, Any]) -> None:
    """Write weights that no training of ours made as a checkpoint: without optimizer or loops.

    Args:
        path: the file; it appears whole or not at all.
        weights: of the detector, by name.
        hyper_parameters: arguments of ``DetectionModule``.

    Raises:
        UserError: it cannot be written there.
    """
    checkpoint = {
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": 0,
        "hyper_parameters": dict(hyper_parameters),
        "state_dict": {f"detector.{name}": value for name, value in weights.items()},
    }
    aside = path.with_name(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, aside)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises the latter
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from None
