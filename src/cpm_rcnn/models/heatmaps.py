"""The mapping between boxes and heatmaps of grid points: pure functions (paper section 3.1, docs/method.md section 5).

A box has nine grid points j = 0..8 at column j // 3 (left, middle, right) and row j % 3 (top, middle, bottom). A
heatmap of 56 x 56 cells covers the RoI enlarged by ``mapping_ratio``. Each point is predicted only on its own 28 x 28
*sub-region* of that map. The width of a box is x2 - x1 here, in both box conventions (docs/method.md section 9).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cpm_rcnn.models.losses import LossTerm

NUM_POINTS = 9
MAP_SIZE = 56
SUB_SIZE = 28
# The sub-regions of columns (or rows) 0, 1, 2 start at cells 0, 14, 28 of the whole map.
SUB_STEP = 14
# Factor of the grid loss (docs/method.md section 5). Without it, the mean would be tiny, because only about 5 of 784
# cells are positive.
GRID_LOSS_FACTOR = 15.0
# RoIs whose enlarged width or height is at most this many pixels have all-zero targets.
_MIN_SIDE = 3.0


def sub_regions() -> Tensor:
    """The sub-region of each point on the whole map: (9, 4) int64 cells, xyxy with x2 and y2 exclusive."""
    starts = _sub_starts(torch.empty(0, dtype=torch.int64))
    return torch.cat([starts, starts + SUB_SIZE], dim=1)


def _sub_starts(like: Tensor) -> Tensor:
    """The first cell of each point's sub-region, (9, x or y), with the dtype and device of ``like``."""
    start = torch.arange(3, dtype=like.dtype, device=like.device) * SUB_STEP
    return torch.stack([start.repeat_interleave(3), start.repeat(3)], dim=-1)


def enlarge(rois: Tensor, mapping_ratio: float) -> tuple[Tensor, Tensor]:
    """The area that the heatmaps of ``rois`` cover.

    Args:
        rois: (R, 4) xyxy pixels.
        mapping_ratio: fraction of the width and height that is added to them, half of it on each side.

    Returns:
        The top-left corner (R, 2) and the size (R, 2) of the covered area, (x, y) and (width, height) in pixels.
    """
    corner, size = rois[:, :2], rois[:, 2:] - rois[:, :2]
    return corner - 0.5 * mapping_ratio * size, (1 + mapping_ratio) * size


def grid_targets(rois: Tensor, boxes: Tensor, mapping_ratio: float) -> Tensor:
    """The target heatmaps of ``rois`` whose objects are ``boxes``.

    The cell that contains a ground-truth point and its four neighbors are True, the others False. All cells are False
    if the enlarged RoI is at most 3 pixels wide or high.

    Args:
        rois: (R, 4) float32 xyxy pixels.
        boxes: (R, 4) float32 xyxy pixels; row i is the object of RoI i.
        mapping_ratio: see :func:`enlarge`.

    Returns:
        (R, 9, 28, 28) bool.
    """
    corner, size = enlarge(rois, mapping_ratio)
    middle = 0.5 * (boxes[:, :2] + boxes[:, 2:])
    points = torch.stack([boxes[:, :2], middle, boxes[:, 2:]], dim=1)  # (R, column or row, x or y)
    usable = (size > _MIN_SIDE).all(dim=1)
    side = torch.where(usable[:, None], size, 1.0)
    cells = ((points - corner[:, None]) / side[:, None] * MAP_SIZE).trunc()
    cells = cells - SUB_STEP * torch.arange(3, dtype=cells.dtype, device=cells.device)[:, None]
    axis = torch.arange(SUB_SIZE, dtype=cells.dtype, device=cells.device)
    distance = (cells[..., None] - axis).abs()  # (R, column or row, x or y, cell)
    dx, dy = distance[:, :, 0], distance[:, :, 1]
    # |dx| + |dy| <= 1 on whole numbers is the same as dx^2 + dy^2 <= 1.
    positive = dx[:, :, None, None, :] + dy[:, None, :, :, None] <= 1
    return (positive & usable[:, None, None, None, None]).flatten(1, 2)


def decode_heatmaps(heatmaps: Tensor, rois: Tensor, mapping_ratio: float) -> Tensor:
    """The boxes that the heatmaps of ``rois`` predict; they are not clipped to the image.

    Each side is the mean of its three points' coordinates, weighted by the points' scores.

    Args:
        heatmaps: (R, 9, 28, 28) logits, any floating dtype.
        rois: (R, 4) float32 xyxy pixels.
        mapping_ratio: see :func:`enlarge`.

    Returns:
        (R, 4) float32 xyxy pixels.
    """
    corner, size = enlarge(rois, mapping_ratio)
    scores, best = heatmaps.float().sigmoid().flatten(2).max(dim=2)
    cells = torch.stack([best % SUB_SIZE, best // SUB_SIZE], dim=-1).to(rois.dtype)  # (R, 9, x or y)
    points = corner[:, None] + (cells + _sub_starts(cells) + 0.5) / MAP_SIZE * size[:, None]
    points, weights = points.unflatten(1, (3, 3)), scores.unflatten(1, (3, 3))  # (R, column, row, ...)
    x = _weighted_mean(points[..., 0], weights, dim=2)  # one x for each column
    y = _weighted_mean(points[..., 1], weights, dim=1)  # one y for each row
    return torch.stack([x[:, 0], y[:, 0], x[:, 2], y[:, 2]], dim=1)


def _weighted_mean(values: Tensor, weights: Tensor, dim: int) -> Tensor:
    return (values * weights).sum(dim) / weights.sum(dim).clamp(min=torch.finfo(weights.dtype).tiny)


def grid_loss(heatmaps: Tensor, targets: Tensor, valid: Tensor) -> LossTerm:
    """Binary cross-entropy over valid RoIs, points and cells, times 15, in float32.

    Args:
        heatmaps: (R, 9, 28, 28) logits, any floating dtype.
        targets: (R, 9, 28, 28) bool or floating 0/1.
        valid: (R,) bool.
    """
    logits = heatmaps.float()
    weight = valid[:, None, None, None].to(logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), weight, reduction="sum")
    return LossTerm(GRID_LOSS_FACTOR * total, valid.sum() * logits[0:1].numel())
