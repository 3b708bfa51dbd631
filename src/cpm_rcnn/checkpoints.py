"""Checkpoint files; nothing in them is unpickled but tensors and plain values."""

from pathlib import Path
from typing import Any

import torch

from cpm_rcnn.errors import UserError

# What ``DetectionModule`` stores of itself.
_HYPERPARAMETERS = {"model", "categories", "schedule", "data"}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint that ``train`` wrote: ``hyper_parameters`` of ``DetectionModule``, ``state_dict``, Lightning's rest.

    Raises:
        UserError: no such file, a damaged file, or a checkpoint of another program.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"ckpt={path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"ckpt={path}: not a checkpoint, or a damaged one ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not set(checkpoint.get("hyper_parameters") or ()) >= _HYPERPARAMETERS:
        raise UserError(f"ckpt={path}: not a checkpoint of cpm_rcnn.train")
    return checkpoint
