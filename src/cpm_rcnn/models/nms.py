"""Non-maximum suppression of many groups at once."""

import torch
from torch import Tensor

from cpm_rcnn.ops.nms import nms_mask


def grouped_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, valid: Tensor | None = None
) -> Tensor:
    """Non-maximum suppression within each group, with IoUs in float64. Widths are x2 - x1 in both box conventions.

    In float32, an IoU of exactly 3 / 10 would exceed the threshold 0.3.

    Args:
        boxes: (R, 4) xyxy pixels.
        scores: (R,). Of equal scores, that of the lower row counts as higher.
        groups: (R,) int64; boxes of different groups do not suppress each other.
        iou_threshold: of two boxes that overlap more than this, the one with the lower score is dropped.
        valid: (R,) bool; other rows are dropped and suppress nothing. None: all are valid.

    Returns:
        (R,) bool, the remaining rows.
    """
    # MPS devices have no float64.
    dtype = torch.float32 if boxes.device.type == "mps" else torch.float64
    return nms_mask(boxes.to(dtype), scores, groups, iou_threshold, valid)
