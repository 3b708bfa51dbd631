"""Checks of the targets that a user gives to a model in training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.errors import UserError


def check_targets(targets: Sequence[Any], num_classes: int, convention: BoxConvention, device: torch.device) -> None:
    """Raise :class:`UserError` unless each target is one that the model can be trained on.

    Types, shapes, lengths and devices are always checked. Values are checked only on the CPU: reading them from another
    device would wait for it, and the data module has checked its own.

    Args:
        targets: one dict per image with ``boxes`` (N, 4) and ``labels`` (N,).
        num_classes: number of foreground classes C; labels are 1..C.
        convention: of the boxes.
        device: of the images.
    """
    for i, target in enumerate(targets):
        boxes, labels = (_entry(target, name, f"targets[{i}]", device) for name in ("boxes", "labels"))
        if boxes.dtype == torch.bool or boxes.is_complex() or boxes.ndim != 2 or boxes.shape[1] != 4:
            raise _problem(i, "boxes", f"is {boxes.dtype} {tuple(boxes.shape)}: must be float32 (N, 4), xyxy pixels")
        if labels.dtype not in _INTEGERS or labels.ndim != 1:
            raise _problem(i, "labels", f"is {labels.dtype} {tuple(labels.shape)}: must be int64 (N,)")
        if len(boxes) != len(labels):
            raise UserError(
                f"targets[{i}] has {len(boxes)} boxes and {len(labels)} labels: one label per box is needed"
            )
        if boxes.device.type == "cpu":
            _check_values(i, boxes, labels, num_classes, convention)


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check_values(i: int, boxes: Tensor, labels: Tensor, num_classes: int, convention: BoxConvention) -> None:
    outside = (labels < 1) | (labels > num_classes)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise _problem(i, f"labels[{row}]", f"is {int(labels[row])}: must be 1 to {num_classes}; 0 is background")
    nonfinite = ~boxes.isfinite().all(dim=1)
    inverted = convention.inverted(boxes)
    for wrong, why in ((nonfinite, "must be finite"), (inverted, "must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")):
        if wrong.any():
            row = int(wrong.nonzero()[0])
            numbers = ", ".join(f"{value:g}" for value in boxes[row].tolist())
            raise _problem(i, f"boxes[{row}]", f"is ({numbers}): {why}")


def _entry(target: Any, name: str, where: str, device: torch.device) -> Tensor:
    if not isinstance(target, dict):
        raise UserError(f'{where} is a {type(target).__name__}: must be a dict with "boxes" and "labels"')
    if name not in target:
        raise UserError(f'{where} has no "{name}": it must have "boxes" and "labels"')
    value = target[name]
    if not isinstance(value, Tensor):
        raise UserError(f'{where}["{name}"] is a {type(value).__name__}: must be a tensor')
    if value.device != device:
        raise UserError(f'{where}["{name}"] is on {value.device}, but the images are on {device}')
    return value


def _problem(i: int, entry: str, problem: str) -> UserError:
    name, bracket, row = entry.partition("[")
    return UserError(f'targets[{i}]["{name}"]{bracket}{row} {problem}')
