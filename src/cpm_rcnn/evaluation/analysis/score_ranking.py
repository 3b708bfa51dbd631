"""Does the score follow the quality of the box? After classification, after ISM and after RSM.

This is the claim of the paper (sections 3.3 and 3.4): a detector whose score follows the IoU ranks good boxes first.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from cpm_rcnn.evaluation.analysis.outcomes import IGNORED, Outcomes
from cpm_rcnn.evaluation.analysis.split import EvaluatedSplit
from cpm_rcnn.evaluation.engines import precision_and_recall, summarize
from cpm_rcnn.evaluation.matching import IOU

POINTS = 400  # of a scatter plot
BINS = 10


def score_ranking(split: EvaluatedSplit, outcomes: Outcomes) -> dict[str, Any]:
    """Rank correlation of score and IoU, and AP, if detections were ranked by the score after each step.

    All steps are compared on the same boxes: those of the finished detections.

    Args:
        split: the evaluated split. Without details, there is one step, the final score.
        outcomes: its outcomes.

    Returns:
        ``found_iou``; ``stages``, a list of dicts with ``name`` (``classification``, ``ISM``, ``RSM``, or ``score``),
        ``rank_correlation`` (Spearman's, of ``all`` detections and of those that ``found`` an object of their class
        with at least that IoU), ``AP``, ``AP50``, ``AP75``, ``points`` (score, IoU) and ``bins``; and
        ``predicted_iou``, the same for the IoU that ISM predicts, without APs, or None.
    """
    counted = outcomes.kinds != IGNORED
    stages = []
    for name, scores in _steps(split):
        data = replace(split.data, found_scores=scores)
        metrics = dict(zip(("AP", "AP50", "AP75"), summarize(*precision_and_recall(data))))
        stages.append({"name": name, **_against_iou(scores[counted], outcomes.ious[counted]), **metrics})
    predicted = None
    if split.details is not None and _defined(split.details[:, 1]):
        predicted = {"name": "predicted IoU", **_against_iou(split.details[counted, 1], outcomes.ious[counted])}
    return {"found_iou": IOU, "stages": stages, "predicted_iou": predicted}


def _steps(split: EvaluatedSplit) -> list[tuple[str, np.ndarray]]:
    """Name and scores (N,) after each step that the head has; the last are the final scores."""
    final = split.data.found_scores
    if split.details is None or not _defined(split.details[:, 0]):
        return [("score", final)]
    class_scores, iou, probability = split.details.T
    has_iou, has_probability = _defined(iou), _defined(probability)
    steps = [("classification", class_scores)]
    if has_iou and has_probability:
        steps.append(("ISM", class_scores * iou))
    last = "RSM" if has_probability else "ISM" if has_iou else None
    return [*steps, (last, final)] if last else [("classification", final)]


def _defined(column: np.ndarray) -> bool:
    return bool(len(column)) and not np.isnan(column).any()


def _against_iou(scores: np.ndarray, ious: np.ndarray) -> dict[str, Any]:
    found = ious >= IOU
    order = np.argsort(scores, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(POINTS, len(order))).astype(int))]
    return {
        "rank_correlation": {
            "all": rank_correlation(scores, ious),
            "found": rank_correlation(scores[found], ious[found]),
        },
        "points": np.stack([scores[shown], ious[shown]], axis=1).tolist(),
        "bins": _bins(scores, ious),
    }


def _bins(scores: np.ndarray, ious: np.ndarray) -> list[dict[str, float]]:
    """Mean and quartiles of the IoU of the detections in each tenth of the range of scores; none for an empty tenth."""
    numbers = np.minimum((scores * BINS).astype(int), BINS - 1)
    bins = []
    for number in np.unique(numbers):
        inside = ious[numbers == number]
        low, high = np.percentile(inside, (25, 75))
        edges = {"low": number / BINS, "high": (number + 1) / BINS, "count": len(inside)}
        bins.append(edges | {"iou_mean": float(inside.mean()), "iou_low": float(low), "iou_high": float(high)})
    return bins


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two (N,) arrays; equal values share the mean of their ranks.

    NaN if it is undefined, because there are fewer than two values or all are equal.
    """
    ranks = [_ranks(first), _ranks(second)]
    deviations = [each - each.mean() if len(each) else each for each in ranks]
    norm = np.sqrt(np.prod([(each**2).sum() for each in deviations]))
    return float((deviations[0] * deviations[1]).sum() / norm) if norm > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]
