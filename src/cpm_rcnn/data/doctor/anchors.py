"""How well the anchors of the region proposal network fit the objects.

Anchors are at the cells of a grid, so the best one of each shape is found without comparing all: the overlap decreases
with the distance of the centers, separately in both directions, and the nearest cell has the largest IoU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.data.doctor.checked_split import CheckedSplit
from cpm_rcnn.data.doctor.finding import EXAMPLES, Finding, Severity, percent
from cpm_rcnn.data.problem import counted

# Objects below the first IoU are found only by their best anchor; from the second on, anchors are positive.
LOW_IOU, _POSITIVE_IOU = 0.3, 0.7
# Shares of the objects without a good anchor, and without a positive one, from which on it is a warning.
_MANY_UNMATCHED, _MANY_IGNORED = 0.01, 0.25
# Images are padded to multiples of this.
_DIVISOR = 32
# Objects that are processed at once, which bounds the memory.
_CHUNK = 1 << 16
# Objects from which anchor sizes are estimated at most.
_SAMPLE = 20_000
# Quantiles of the objects' sizes, one for each level.
_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Anchors:
    """The anchors of a region proposal network.

    Attributes:
        sizes: square root of the anchors' area in pixels, one for each level.
        strides: distance between two cells in pixels, one for each level.
        ratios: aspect ratios, height / width.
        convention: the box coordinate convention.
        ignore_border: whether training ignores anchors that cross the image border.
    """

    sizes: Sequence[float]
    strides: Sequence[int]
    ratios: Sequence[float]
    convention: BoxConvention
    ignore_border: bool

    def best_iou(self, boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The IoU of each box with its best anchor.

        Args:
            boxes: (N, 4) float32 xyxy pixels, which end where the last pixel ends.
            sizes: (N, 2), height and width in pixels of the image that each box is in, without padding.

        Returns:
            (N,) float32 of all anchors, and (N,) float32 of those that do not cross the image border; 0 if there is
            none.
        """
        best = np.zeros((2, len(boxes)), dtype=np.float32)
        shapes = [
            (stride, anchor)
            for stride, size in zip(self.strides, self.sizes)
            for anchor in self._cell_anchors(stride, size)
        ]
        for start in range(0, len(boxes), _CHUNK):
            rows = slice(start, start + _CHUNK)
            corners = np.ascontiguousarray(boxes[rows].T)
            sides = np.ascontiguousarray(sizes[rows].T).astype(np.float32)[::-1]
            area = (corners[2] - corners[0]) * (corners[3] - corners[1])
            for stride, (x1, y1, x2, y2) in shapes:
                x = _overlaps(corners[0], corners[2], x1, x2, stride, sides[0])
                y = _overlaps(corners[1], corners[3], y1, y2, stride, sides[1])
                both = area + (x2 - x1) * (y2 - y1)
                for kind in (0, 1):
                    intersection = x[kind] * y[kind]
                    np.maximum(best[kind, rows], intersection / (both - intersection), out=best[kind, rows])
        return best[0], best[1]

    def _cell_anchors(self, stride: int, size: float) -> list[list[float]]:
        """The anchors of the first cell, xyxy, which end where the last pixel ends."""
        anchors = self.convention.cell_anchors(stride, size, self.ratios)
        anchors[:, 2:] += self.convention.extra
        return anchors.tolist()


def _overlaps(
    start: np.ndarray, end: np.ndarray, first: float, last: float, stride: int, side: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Overlap (N,) in one direction with the nearest anchor of all, and of those inside the image; 0 if there is none.

    Args:
        start: (N,) where the boxes start.
        end: (N,) where they end.
        first: where the anchor of the first cell starts.
        last: where it ends.
        stride: distance of the cells.
        side: (N,) length of the image.
    """
    nearest = np.rint((start + end - (first + last)) * (0.5 / stride))
    last_cell = np.ceil(np.ceil(side / _DIVISOR) * (_DIVISOR / stride)) - 1
    every = np.clip(nearest, 0, last_cell)
    # With a margin for rounding errors.
    low = max(np.ceil(-first / stride - 1e-5), 0)
    high = np.minimum(np.floor((side - last) / stride + 1e-5), last_cell)
    inside = np.clip(nearest, low, high)
    overlap_all, overlap_inside = (
        (np.minimum(end, last + stride * cell) - np.maximum(start, first + stride * cell)).clip(min=0)
        for cell in (every, inside)
    )
    return overlap_all, np.where(low <= high, overlap_inside, 0)


@dataclass(frozen=True, eq=False)
class AnchorFit:
    """How anchors fit the N used objects of a split.

    Attributes:
        best: (N,) float32, the IoU of each object with its best anchor.
        ignored: (N,) bool, the objects that have no positive anchor if anchors that cross the image border are ignored:
            all of their best anchors do, and no other anchor has an IoU of 0.7.
    """

    best: np.ndarray
    ignored: np.ndarray

    @classmethod
    def of(cls, split: CheckedSplit, anchors: Anchors) -> "AnchorFit":
        best, inside = anchors.best_iou(split.input_boxes, split.input_sizes[split.image_rows])
        return cls(best, (inside < _POSITIVE_IOU) & (inside < best * (1 - 1e-5)))

    @property
    def unmatched(self) -> np.ndarray:
        """(N,) bool, the objects whose best anchor has a low IoU."""
        return self.best < LOW_IOU


def suggested_sizes(split: CheckedSplit, anchors: Anchors) -> tuple[list[int], float]:
    """Anchor sizes for the objects of a split, and the share of objects whose best anchor then has a low IoU.

    They are quantiles of the square roots of the objects' areas, or a geometric series between the smallest and the
    largest of them: whichever leaves fewer objects without a good anchor.
    """
    rows = np.arange(len(split.objects))
    if len(rows) > _SAMPLE:
        rows = rows[np.linspace(0, len(rows) - 1, _SAMPLE).astype(np.int64)]
    boxes, sizes = split.input_boxes[rows], split.input_sizes[split.image_rows[rows]]
    roots = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    smallest, largest = np.quantile(roots, (0.02, 0.98))
    candidates = [np.quantile(roots, _QUANTILES), np.geomspace(smallest, max(largest, 2 * smallest), len(_QUANTILES))]
    rated = []
    for candidate in map(_rounded, candidates):
        best, _ = replace(anchors, sizes=candidate).best_iou(boxes, sizes)
        rated.append((float((best < LOW_IOU).mean()), -float(best.mean()), candidate))
    share, _, chosen = min(rated)
    return chosen, share


def _rounded(sizes: np.ndarray) -> list[int]:
    """Increasing multiples of 4, of 8 from 64 on, and of 16 from 128 on."""
    rounded: list[int] = []
    for size in sizes.tolist():
        step = 4 if size < 64 else 8 if size < 128 else 16
        value = max(step * round(size / step), 4)
        rounded.append(value if not rounded or value > rounded[-1] else rounded[-1] + step)
    return rounded


def anchor_findings(split: CheckedSplit, anchors: Anchors) -> list[Finding]:
    """Objects of the training split that no anchor fits, and those that lose their anchors at the image border."""
    fit, total = AnchorFit.of(split, anchors), len(split.objects)
    found = []
    if (count := int(fit.unmatched.sum())) > 0:
        sizes, share = suggested_sizes(split, anchors)
        better = share < 0.9 * count / total
        advice = f"With sizes from the data, it would be {100 * share:.1f} %." if better else ""
        override = f"anchor_sizes=[{','.join(map(str, sizes))}]" if better else ""
        worst = np.argsort(fit.best, kind="stable")[: min(count, EXAMPLES)]
        examples = tuple(split.object_example(row, f"IoU {fit.best[row]:.2f}") for row in worst.tolist())
        sentence = (
            f"The best anchor of {counted(count, 'training object', 'training objects')} ({percent(count, total)}) has "
            f"an IoU below {LOW_IOU}."
        )
        severity: Severity = "warning" if count >= _MANY_UNMATCHED * total else "note"
        found.append(Finding(severity, "anchor sizes", sentence, count, examples, advice, override))
    if anchors.ignore_border and (count := int(fit.ignored.sum())) > 0:
        rows = np.flatnonzero(fit.ignored)[:EXAMPLES].tolist()
        sentence = (
            f"{counted(count, 'training object has', 'training objects have')} no positive anchor "
            f"({percent(count, total)}), because anchors that cross the image border are ignored."
        )
        severity = "warning" if count >= _MANY_IGNORED * total else "note"
        examples = tuple(map(split.object_example, rows))
        override = "ignore_border_anchors=false"
        found.append(Finding(severity, "border anchors", sentence, count, examples, "", override))
    return found
