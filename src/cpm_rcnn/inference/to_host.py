"""Copies of detections on the host."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpm_rcnn.models.host import read, reads_are_free


def to_host(detections: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The detections of several images on the CPU: one copy of all of them, so that the host waits once.

    Args:
        detections: one dict per image, with columns (N, ...) that float32 represents, such as boxes, scores and labels.
    """
    columns = [column for found in detections for column in found.values()]
    if all(reads_are_free(column) for column in columns):
        return list(detections)
    values = read(torch.cat([column.flatten().float() for column in columns]))
    parts = values.split([column.numel() for column in columns])
    copies = iter([part.view(column.shape).to(column.dtype) for part, column in zip(parts, columns)])
    return [{name: next(copies) for name in found} for found in detections]
