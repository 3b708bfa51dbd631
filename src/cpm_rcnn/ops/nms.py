"""Non-maximum suppression of many groups at once, as a mask."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou


@torch.no_grad()
def nms_mask(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, valid: Tensor | None = None
) -> Tensor:
    """Non-maximum suppression within each group. Widths are x2 - x1 in both box conventions.

    Args:
        boxes: (R, 4) xyxy pixels.
        scores: (R,). Of equal scores, that of the lower row counts as higher.
        groups: (R,) int64; boxes of different groups do not suppress each other.
        iou_threshold: of two boxes that overlap more than this, the one with the lower score is dropped.
        valid: (R,) bool; other rows are dropped and suppress nothing. None: all are valid.

    Returns:
        (R,) bool, the remaining rows.
    """
    if valid is None:
        valid = torch.ones_like(groups, dtype=torch.bool)
    scores = scores.to(boxes.dtype)
    if boxes.device.type == "cpu":
        rows = valid.nonzero().squeeze(1)
        kept = rows[batched_nms(boxes[rows], scores[rows], groups[rows], iou_threshold)]
        return torch.zeros_like(valid).index_fill_(0, kept, True)
    order = scores.masked_fill(~valid, -torch.inf).argsort(descending=True, stable=True)
    overlap = (box_iou(boxes[order], boxes[order]) > iou_threshold) & (groups[order, None] == groups[order])
    suppresses = overlap.triu(diagonal=1)
    kept = valid[order]
    for row in range(len(order)):
        kept = kept & ~(suppresses[row] & kept[row])
    return torch.empty_like(kept).index_copy_(0, order, kept)
