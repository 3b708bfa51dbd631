"""Non-maximum suppression of many groups at once."""

import torch
from torch import Tensor

from cpm_rcnn.models.host import exporting, reads_are_free, rows_where
from cpm_rcnn.ops.nms import nms_mask

# torchvision's batched_nms on a CPU keeps the order of equal scores of up to so many boxes.
_STABLE = 1000


def grouped_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression within each group. Widths are x2 - x1 in both box conventions.

    Args:
        boxes: (R, 4) xyxy pixels.
        scores: (R,).
        groups: (R,) int64; boxes of different groups do not suppress each other.
        iou_threshold: of two boxes that overlap more than this, the one with the lower score is dropped.
        valid: (R,) bool; other rows are dropped and suppress no box.

    Returns:
        (K,) int64, the remaining rows, best score first, and (K,) bool, all True. On an accelerator all R rows: the
        remaining ones first, and False for the others.
    """
    # IoUs are computed in float64. MPS devices do not have it.
    dtype = torch.float32 if boxes.device.type == "mps" else torch.float64
    kept = nms_mask(boxes.to(dtype), scores, groups, iou_threshold, valid)
    rows = _best_first(scores, kept)
    return rows, kept[rows]


def _best_first(scores: Tensor, mask: Tensor) -> Tensor:
    """The rows where ``mask`` is True by descending scores; on an accelerator followed by the others."""
    if not reads_are_free(mask):
        return scores.masked_fill(~mask, -torch.inf).argsort(descending=True, stable=True)
    rows = rows_where(mask, mask.shape[0])
    # Equal scores are ordered as by torchvision's batched_nms, so that results do not depend on the version of this
    # package.
    stable = exporting() or len(mask) <= _STABLE
    return rows[scores[rows].double().argsort(descending=True, stable=stable)]
