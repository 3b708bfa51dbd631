"""Are the boxes shifted or scaled against the annotations?"""

from typing import Any

import numpy as np

from cpm_rcnn.evaluation.analysis.outcomes import CORRECT, Outcomes
from cpm_rcnn.evaluation.analysis.split import EvaluatedSplit
from cpm_rcnn.evaluation.matching import IOU

ALL = "all"
# A median is clear if it is at least this many pixels and this share of the object's side, and this many standard
# errors away from 0.
_PIXELS, _SHARE, _ERRORS = 0.5, 0.01, 4.0
_FEWEST = 20


def box_offsets(split: EvaluatedSplit, outcomes: Outcomes) -> dict[str, Any] | None:
    """How far the edges of correct detections are from those of their annotations.

    Args:
        split: the evaluated split.
        outcomes: its outcomes.

    Returns:
        ``found_iou`` and ``classes``, a list of dicts for all classes together and for each class with correct
        detections: ``name``, ``count``, and four values for left, top, right and bottom: ``pixels``, the median of
        detection minus annotation; ``relative``, the same in shares of the object's width or height; ``spread``, the
        interquartile range in pixels; ``clear``, whether the median is clearly not 0. None without correct detections.
    """
    data = split.data
    rows = (outcomes.kinds == CORRECT).nonzero()[0]
    if not len(rows):
        return None
    objects = outcomes.matched[rows]
    difference = _corners(data.found_boxes[rows]) - _corners(data.object_boxes[objects])
    relative = difference / np.tile(np.maximum(data.object_boxes[objects, 2:], 1e-9), 2)
    classes = data.found_categories[rows]
    groups = [(ALL, np.ones(len(rows), dtype=bool))]
    groups += [(name, classes == k) for k, name in enumerate(split.class_names, start=1)]
    return {
        "found_iou": IOU,
        "classes": [
            {"name": name, **_summary(difference[inside], relative[inside])} for name, inside in groups if inside.any()
        ],
    }


def _summary(difference: np.ndarray, relative: np.ndarray) -> dict[str, Any]:
    low, pixels, high = np.percentile(difference, (25, 50, 75), axis=0)
    share = np.median(relative, axis=0)
    # Of a normal distribution, the standard error of the median is 1.25 standard deviations over the root of the
    # number, and a standard deviation is the interquartile range over 1.35.
    error = 1.25 / 1.35 * (high - low) / np.sqrt(len(difference))
    clear = (abs(pixels) >= _PIXELS) & (abs(share) >= _SHARE) & (abs(pixels) > _ERRORS * error)
    return {
        "count": len(difference),
        "pixels": pixels.tolist(),
        "relative": share.tolist(),
        "spread": (high - low).tolist(),
        "clear": (clear & (len(difference) >= _FEWEST)).tolist(),
    }


def _corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
