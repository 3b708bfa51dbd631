"""Soft-NMS: reduces the scores of overlapping boxes instead of dropping the boxes."""

import torch
from torch import Tensor

from cpm_rcnn.boxes import CONTINUOUS


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float = 0.5, min_score: float = 0.001
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear soft-NMS per class (Bodla et al., ICCV 2017, equation 2).

    The box with the highest score is selected, and every other box of its class whose IoU with it exceeds the threshold
    has its score multiplied by 1 - IoU. This repeats with the remaining boxes. All classes are processed in
    parallel, one box per class and round, until no class has a score above ``min_score`` left.

    Boxes whose score or coordinates are not finite are dropped.

    Args:
        boxes: (N, 4) float, xyxy pixels; widths are x2 - x1 in both box conventions
            (docs/method.md section 9).
        scores: (N,) float, at least 0.
        labels: (N,) int64.
        iou_threshold: boxes that overlap by no more than this keep their scores.
        min_score: boxes whose reduced score is not above this are dropped; at least 0.

    Returns:
        Boxes (M, 4), reduced scores (M,) in descending order, and labels (M,).
    """
    rows, scores = soft_nms_rows(boxes, scores, labels, iou_threshold, min_score)
    return boxes[rows], scores, labels[rows]


def soft_nms_rows(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float = 0.5, min_score: float = 0.001
) -> tuple[Tensor, Tensor]:
    """As :func:`soft_nms`, but returns the rows (M,) int64 of the boxes that remain, and their reduced scores (M,)."""
    # A score of NaN would be the highest of its class and end it.
    finite = (scores.isfinite() & boxes.isfinite().all(dim=1)).nonzero().squeeze(1)
    boxes, scores, labels = boxes[finite], scores[finite], labels[finite]
    if len(scores) == 0:
        return finite, scores

    # One row per class, padded with boxes of score 0, which are never selected.
    _, row, counts = labels.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    row = row[order]
    starts = counts.cumsum(0) - counts
    column = torch.arange(len(row), device=row.device) - starts[row]
    longest = int(counts.max())
    table = boxes.new_zeros(len(counts), longest, 4)
    table[row, column] = boxes[order]
    waiting = scores.new_zeros(len(counts), longest)
    waiting[row, column] = scores[order]
    picked = torch.zeros_like(waiting)

    classes = torch.arange(len(counts), device=row.device)
    while True:
        best, place = waiting.max(dim=1)
        active = best > min_score
        if not active.any():
            break
        # In a class without an active box, this overwrites a score that is too low to be selected later.
        picked[classes, place] += torch.where(active, best, 0)
        waiting[classes, place] = 0
        iou = CONTINUOUS.iou(table[classes, place][:, None], table)
        waiting *= torch.where(iou > iou_threshold, 1 - iou, 1)

    decayed = picked[row, column]
    kept = decayed.argsort(descending=True, stable=True)[: int((decayed > 0).sum())]
    return finite[order[kept]], decayed[kept]
