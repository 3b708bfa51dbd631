"""Non-maximum suppression of many groups at once."""

import torch
from torch import Tensor

from cpm_rcnn.ops.nms import nms_mask


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within each group. Widths are x2 - x1 in both box conventions.

    Args:
        boxes: (R, 4) xyxy pixels.
        scores: (R,).
        groups: (R,) int64; boxes of different groups do not suppress each other.
        iou_threshold: of two boxes that overlap more than this, the one with the lower score is dropped.

    Returns:
        (K,) int64 indices of the remaining boxes, best score first. Equal scores keep their order.
    """
    # IoUs are computed in float64. MPS devices do not have it.
    dtype = torch.float32 if boxes.device.type == "mps" else torch.float64
    kept = nms_mask(boxes.to(dtype), scores, groups, iou_threshold).nonzero().squeeze(1)
    return kept[scores[kept].argsort(descending=True, stable=True)]
