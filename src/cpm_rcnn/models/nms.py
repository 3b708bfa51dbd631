"""Non-maximum suppression of many groups at once."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within each group. Widths are x2 - x1 in both box conventions.

    Args:
        boxes: (R, 4) xyxy pixels.
        scores: (R,).
        groups: (R,) int64; boxes of different groups do not suppress each other.
        iou_threshold: of two boxes that overlap more than this, the one with the lower score is dropped.

    Returns:
        (K,) int64 indices of the remaining boxes, best score first.
    """
    # batched_nms separates groups by shifting their boxes; in float32 that would round the coordinates. MPS devices
    # have no float64.
    dtype = torch.float32 if boxes.device.type == "mps" else torch.float64
    return batched_nms(boxes.to(dtype), scores.to(dtype), groups, iou_threshold)
