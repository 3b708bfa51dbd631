"""Precision-recall curves, and F1, precision and recall against the score threshold."""

from typing import Any

import numpy as np

from cpm_rcnn.evaluation.analysis.outcomes import CORRECT, IGNORED, Outcomes
from cpm_rcnn.evaluation.analysis.split import EvaluatedSplit

MEAN = "mean"
RECALLS = np.linspace(0, 1, 101)
THRESHOLDS = np.linspace(0, 1, 101)
_DIGITS = 4  # of a chart; they keep the report of many classes small


def curves(split: EvaluatedSplit, outcomes: Outcomes, precision: np.ndarray) -> dict[str, Any]:
    """The curves of the mean over the classes with objects, and of each class.

    Args:
        split: the evaluated split.
        outcomes: its outcomes.
        precision: COCO's precision (10, 101, K, 4, 3) of
            :func:`~cpm_rcnn.evaluation.engines.precision_and_recall`.

    Returns:
        ``recalls`` (101), ``thresholds`` (101) and ``series``, a list of dicts with ``name``; ``precision`` by IoU
        (``0.50``, ``0.75``, ``0.50:0.95``) at each recall, with 100 detections per image; and ``f1``, ``precision_at``
        and ``recall_at`` each threshold at IoU 0.5. NaN if undefined.
    """
    of_all = precision[:, :, :, 0, 2]
    defined = np.where(of_all > -1, of_all, np.nan)
    by_iou = {"0.50": defined[0].T, "0.75": defined[5].T, "0.50:0.95": defined.mean(axis=0).T}
    at = _at_thresholds(split, outcomes)
    values = [*by_iou.values(), *at.values()]
    series = []
    for k, name in enumerate([MEAN, *split.class_names]):
        rows = [mean_of_defined(value) if k == 0 else value[k - 1] for value in values]
        lists = [row.round(_DIGITS).tolist() for row in rows]
        series.append({"name": name, "precision": dict(zip(by_iou, lists)), **dict(zip(at, lists[len(by_iou) :]))})
    return {"recalls": RECALLS.tolist(), "thresholds": THRESHOLDS.round(2).tolist(), "series": series}


def _at_thresholds(split: EvaluatedSplit, outcomes: Outcomes) -> dict[str, np.ndarray]:
    """(K, 101) each: F1, precision and recall of the detections whose score is at least the threshold."""
    data = split.data
    counted = outcomes.kinds != IGNORED
    number = len(THRESHOLDS)
    # The number of thresholds that a score reaches; its detection counts at these.
    reached = np.searchsorted(THRESHOLDS, data.found_scores[counted], side="right")
    classes = data.found_categories[counted] - 1
    correct = outcomes.kinds[counted] == CORRECT

    def totals(rows: np.ndarray) -> np.ndarray:
        counts = np.zeros((data.categories, number + 1))
        np.add.at(counts, (classes[rows], reached[rows]), 1)
        return counts[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]

    found, kept = totals(correct), totals(np.ones_like(correct))
    objects = np.bincount(data.object_categories[~data.object_crowds] - 1, minlength=data.categories)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        f1, precision, recall = 2 * found / (kept + objects), found / kept, found / objects
    for values in (f1, precision, recall):
        values[objects[:, 0] == 0] = np.nan
    return {"f1": f1, "precision_at": precision, "recall_at": recall}


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """The mean over the rows, without NaN; NaN where all are."""
    defined = ~np.isnan(values)
    number = defined.sum(axis=0)
    sums = np.where(defined, values, 0).sum(axis=0)
    return np.divide(sums, number, out=np.full(sums.shape, np.nan), where=number > 0)
