"""The content of ``report.json``: everything that the HTML report shows, as plain values."""

import importlib.util
from typing import Any

import numpy as np

from cpm_rcnn.evaluation.analysis.by_hotcoco import confusion, errors_and_calibration
from cpm_rcnn.evaluation.analysis.curves import curves
from cpm_rcnn.evaluation.analysis.findings import findings
from cpm_rcnn.evaluation.analysis.image_costs import costly_images
from cpm_rcnn.evaluation.analysis.labels import suspicious_labels
from cpm_rcnn.evaluation.analysis.offsets import box_offsets
from cpm_rcnn.evaluation.analysis.outcomes import Outcomes, find_outcomes
from cpm_rcnn.evaluation.analysis.score_ranking import score_ranking
from cpm_rcnn.evaluation.analysis.split import EvaluatedSplit
from cpm_rcnn.evaluation.bootstrap import AREAS
from cpm_rcnn.evaluation.engines import METRIC_NAMES, hotcoco_refusal, mean_of_defined, precision_and_recall, summarize

_SIZES = ("small", "medium", "large")


def analyze(split: EvaluatedSplit, operating_points: dict[str, Any]) -> dict[str, Any]:
    """Analyze the detections of a split.

    Detections above the score threshold of best F1 of their class are those that are shown and that the confusion
    matrix counts. Those above the threshold of the wanted precision (or of best F1, if there is none) are the
    confident ones, which annotations are checked against.

    Args:
        split: the split.
        operating_points: the return value of
            :func:`~cpm_rcnn.evaluation.operating_points.operating_points` for the same detections.

    Returns:
        A dict with the keys ``findings``, ``metrics``, ``classes``, ``sizes``, ``curves``, ``operating_points``,
        ``confusion``, ``errors``, ``calibration``, ``scores``, ``offsets``, ``images``, ``labels`` and ``missing``, the
        sections that could not be computed with the reason. Shares and metrics are 0 to 1, NaN if undefined.
    """
    data = split.data
    precision, recall = precision_and_recall(data)
    outcomes = find_outcomes(data)
    points = list(operating_points["classes"].values())
    shown = data.found_scores >= _thresholds(points, "best_f1")[data.found_categories - 1]
    confident = data.found_scores >= _thresholds(points, "precision")[data.found_categories - 1]
    kept = split.detections(shown)
    kept_outcomes = find_outcomes(kept.data)
    parts, missing = _hotcoco_parts(split, outcomes, kept, kept_outcomes)
    report = {
        "metrics": dict(zip(METRIC_NAMES, map(_nan, summarize(precision, recall)), strict=True)),
        "classes": _classes(split, precision, recall),
        "sizes": _sizes(split, precision, recall),
        "curves": curves(split, outcomes, precision),
        "operating_points": operating_points,
        **parts,
        "scores": score_ranking(split, outcomes),
        "offsets": box_offsets(split, outcomes),
        "images": costly_images(split, kept, kept_outcomes),
        "labels": suspicious_labels(split, outcomes, confident),
        "missing": missing,
    }
    return {"findings": findings(report), **report}


def _hotcoco_parts(
    split: EvaluatedSplit, outcomes: Outcomes, kept: EvaluatedSplit, kept_outcomes: Outcomes
) -> tuple[dict[str, Any], dict[str, str]]:
    """The sections that hotcoco computes, None if it cannot, and the reasons for the missing ones."""
    names = ("confusion", "errors", "calibration")
    reason = hotcoco_refusal(split.data)
    if not split.data.images or not split.data.categories:
        reason = "there are no images or no classes"
    elif importlib.util.find_spec("hotcoco") is None:
        reason = "hotcoco is not installed; pip install hotcoco"
    if reason is None:
        errors, calibration = errors_and_calibration(split, outcomes)
        return dict(zip(names, (confusion(kept, kept_outcomes), errors, calibration))), {}
    return dict.fromkeys(names), dict.fromkeys(names, reason)


def _thresholds(points: list[dict[str, Any]], name: str) -> np.ndarray:
    """(K,) the threshold of the named operating point of each class, or that of best F1; infinity without any."""
    chosen = [each[name] or each["best_f1"] for each in points]
    return np.array([np.inf if point is None else point["threshold"] for point in chosen])


def _nan(value: float) -> float:
    """NaN instead of pycocotools' -1 for undefined metrics."""
    return float("nan") if value == -1 else value


def _classes(split: EvaluatedSplit, precision: np.ndarray, recall: np.ndarray) -> list[dict[str, Any]]:
    data = split.data
    objects = np.bincount(data.object_categories[~data.object_crowds], minlength=data.categories + 1)[1:]
    detections = np.bincount(data.found_categories, minlength=data.categories + 1)[1:]
    rows = []
    for k, (key, name) in enumerate(zip(split.class_ids, split.class_names, strict=True)):
        of_class = precision[:, :, k, :, 2]
        values = {
            "AP": of_class[..., 0],
            "AP50": of_class[0, :, 0],
            "AP75": of_class[5, :, 0],
            "APs": of_class[..., 1],
            "APm": of_class[..., 2],
            "APl": of_class[..., 3],
            "AR100": recall[:, k, 0, 2],
        }
        metrics = {metric: _nan(mean_of_defined(value)) for metric, value in values.items()}
        rows.append({"name": name, "id": key, "objects": int(objects[k]), "detections": int(detections[k]), **metrics})
    return rows


def _sizes(split: EvaluatedSplit, precision: np.ndarray, recall: np.ndarray) -> list[dict[str, Any]]:
    areas = split.data.object_areas[~split.data.object_crowds]
    return [
        {
            "name": name,
            "objects": int(((areas >= low) & (areas <= high)).sum()),
            "AP": _nan(mean_of_defined(precision[..., number, 2])),
            "AR": _nan(mean_of_defined(recall[..., number, 2])),
        }
        for number, (name, (low, high)) in enumerate(zip(_SIZES, AREAS[1:]), start=1)
    ]
