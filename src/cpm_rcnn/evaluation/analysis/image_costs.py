"""The images that cost most AP."""

from typing import Any

import numpy as np

from cpm_rcnn.evaluation.analysis.curves import mean_of_defined
from cpm_rcnn.evaluation.analysis.outcomes import BACKGROUND, CORRECT, IGNORED, KINDS, Outcomes
from cpm_rcnn.evaluation.analysis.split import EvaluatedSplit
from cpm_rcnn.evaluation.bootstrap import average_precisions, match_all
from cpm_rcnn.evaluation.matching import IOU

MISSED = "missed"
SHOWN = 24
# AP without an image is computed for at most this many images, those with most errors.
_CANDIDATES = 300


def costly_images(split: EvaluatedSplit, kept: EvaluatedSplit, outcomes: Outcomes) -> dict[str, Any]:
    """The images without which AP would be highest, with their detections and missed objects.

    Args:
        split: the evaluated split.
        kept: the same split with the detections that are shown and counted as errors.
        outcomes: the outcomes of ``kept``.

    Returns:
        ``iou`` and ``list``, at most 24 images, the one that costs most first. An image is a dict of ``id``,
        ``file_name``, ``width``, ``height``, ``cost`` (AP without the image minus AP), ``counts`` (by kind) and
        ``items``: detections and missed objects with ``kind``, ``class``, ``score``, ``iou``, ``other`` (the class of
        the overlapped object, if it is another one) and ``box`` (x, y, width, height in pixels).
    """
    errors = errors_per_image(kept, outcomes)
    candidates = np.argsort(-errors, kind="stable")[:_CANDIDATES]
    candidates = candidates[errors[candidates] > 0]
    costs = ap_without_each(split, candidates)
    order = np.lexsort((candidates, -costs))[:SHOWN]
    return {
        "iou": IOU,
        "list": [_image(kept, outcomes, int(candidates[i]), float(costs[i])) for i in order],
    }


def ap_without_each(split: EvaluatedSplit, images: np.ndarray) -> np.ndarray:
    """(R,) AP without each of ``images`` (R,), which are rows from 0, minus AP.

    Classes that have objects in this image only are left out of both.
    """
    weights = np.ones((len(images) + 1, split.data.images), dtype=np.int32)
    weights[np.arange(len(images)) + 1, images] = 0
    values = average_precisions(match_all(split.data), weights, by_area=False)[:, 0].mean(axis=1)
    return mean_of_defined((values[1:] - values[:1]).T)


def errors_per_image(kept: EvaluatedSplit, outcomes: Outcomes) -> np.ndarray:
    """(I,) the number of false positives and missed objects of each image."""
    data = kept.data
    wrong = (outcomes.kinds != CORRECT) & (outcomes.kinds != IGNORED)
    missed = ~outcomes.found & ~data.object_crowds
    number = data.images + 1
    counts = np.bincount(data.found_images[wrong], minlength=number)
    return (counts + np.bincount(data.object_images[missed], minlength=number))[1:]


def _image(kept: EvaluatedSplit, outcomes: Outcomes, row: int, cost: float) -> dict[str, Any]:
    data = kept.data
    items: list[dict[str, Any]] = []
    for i in (data.found_images == row + 1).nonzero()[0].tolist():
        kind, object_row = int(outcomes.kinds[i]), int(outcomes.nearest[i])
        other = None
        if object_row >= 0 and kind != BACKGROUND and data.object_categories[object_row] != data.found_categories[i]:
            other = kept.class_names[data.object_categories[object_row] - 1]
        items.append(
            {
                "kind": KINDS[kind],
                "class": kept.class_names[data.found_categories[i] - 1],
                "score": float(data.found_scores[i]),
                "iou": float(outcomes.ious[i]),
                "other": other,
                "box": data.found_boxes[i].tolist(),
            }
        )
    missed = (data.object_images == row + 1) & ~outcomes.found & ~data.object_crowds
    for i in missed.nonzero()[0].tolist():
        name = kept.class_names[data.object_categories[i] - 1]
        box = data.object_boxes[i].tolist()
        items.append({"kind": MISSED, "class": name, "score": None, "iou": None, "other": None, "box": box})
    kinds = [item["kind"] for item in items]
    width, height = kept.sizes[row].tolist()
    return {
        "id": int(kept.image_ids[row]),
        "file_name": str(kept.file_names[row]),
        "width": width,
        "height": height,
        "cost": cost,
        "counts": {kind: kinds.count(kind) for kind in (*KINDS, MISSED) if kind in kinds},
        "items": items,
    }
