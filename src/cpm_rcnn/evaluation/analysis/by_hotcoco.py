"""Confusion matrix, TIDE's errors and calibration, as hotcoco computes them."""

from dataclasses import replace
from typing import Any

import numpy as np

from cpm_rcnn.evaluation.analysis.outcomes import BACKGROUND_IOU, IGNORED, Outcomes
from cpm_rcnn.evaluation.analysis.split import EvaluatedSplit
from cpm_rcnn.evaluation.engines import EvaluationData, hotcoco_evaluator
from cpm_rcnn.evaluation.matching import IOU

BACKGROUND = "background"
_BINS = 10
# TIDE's kinds of errors: its key, our name, and what it is.
_ERRORS = (
    ("Cls", "classification", "the right place (IoU 0.5 or more), but another class"),
    ("Loc", "localization", "the right class, but IoU 0.1 to 0.5"),
    ("Both", "both", "another class, and IoU 0.1 to 0.5"),
    ("Dupe", "duplicate", "a second detection of an object"),
    ("Bkg", "background", "IoU below 0.1 with every object"),
    ("Miss", "missed", "an object that no detection explains"),
)


def confusion(kept: EvaluatedSplit, outcomes: Outcomes) -> dict[str, Any]:
    """The confusion matrix of the kept detections.

    Args:
        kept: the split with the detections that count.
        outcomes: their outcomes.

    Returns:
        ``classes``, K names and ``background``, and ``counts`` (K + 1, K + 1): rows are annotated, columns detected
        classes. Detections in crowds do not count.
    """
    data = _without_crowds(kept.data, outcomes)
    evaluator = hotcoco_evaluator(data)
    # All detections of an image count, not only the best ones.
    most = int(np.bincount(data.found_images, minlength=1).max()) or 1
    counts = evaluator.confusion_matrix(iou_thr=IOU, max_det=most)["matrix"]
    return {"classes": [*kept.class_names, BACKGROUND], "counts": counts.astype(int).tolist()}


def errors_and_calibration(split: EvaluatedSplit, outcomes: Outcomes) -> tuple[dict[str, Any], dict[str, Any]]:
    """TIDE's split of the lost AP50, and how well scores predict the share of correct detections.

    Returns:
        Errors: ``ap50`` and ``types``, a list of dicts with ``name``, ``text``, ``delta_ap`` (the gain in AP50 if all
        errors of this kind were corrected) and ``count``. Calibration: ``ece``, the expected calibration error, and
        ``bins``, a list of dicts with ``low``, ``high``, ``score`` (mean), ``precision`` and ``count``.
    """
    evaluator = hotcoco_evaluator(split.data)
    evaluator.evaluate()
    found = evaluator.tide_errors(pos_thr=IOU, bg_thr=BACKGROUND_IOU)
    types = [
        {"name": name, "text": text, "delta_ap": found["delta_ap"][key], "count": found["counts"][key]}
        for key, name, text in _ERRORS
    ]
    evaluator = hotcoco_evaluator(_without_crowds(split.data, outcomes))
    evaluator.evaluate()
    calibration = evaluator.calibration(n_bins=_BINS, iou_threshold=IOU)
    names = {
        "low": "bin_lower",
        "high": "bin_upper",
        "score": "avg_confidence",
        "precision": "avg_accuracy",
        "count": "count",
    }
    bins = [{name: each[key] for name, key in names.items()} for each in calibration["bins"] if each["count"]]
    return {"ap50": found["ap_base"], "types": types}, {"ece": calibration["ece"], "bins": bins}


def _without_crowds(data: EvaluationData, outcomes: Outcomes) -> EvaluationData:
    """The same data without crowds and without the detections in them."""
    kept = {"object_": ~data.object_crowds, "found_": outcomes.kinds != IGNORED}
    arrays = [(name, mask) for prefix, mask in kept.items() for name in vars(data) if name.startswith(prefix)]
    return replace(data, **{name: getattr(data, name)[mask] for name, mask in arrays})
