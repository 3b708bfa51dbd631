"""Operating points of a detector: for each class, the score thresholds of the best F1 and of a wanted precision.

Detections and objects are matched at IoU 0.5 as pycocotools matches them, so crowds count neither as hits nor as
misses. Unlike in COCO's metrics, the number of detections per image is not limited.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.evaluation.found import FoundDetections
from cpm_rcnn.evaluation.matching import IGNORED, IOU, TRUE_POSITIVE, match


def operating_points(
    annotations: CocoAnnotations,
    found: FoundDetections,
    categories: Mapping[str, int],
    precision: float | None = None,
) -> dict[str, Any]:
    """The operating points of each class.

    Args:
        annotations: the ground truth.
        found: the detections, and the images that count.
        categories: from the name of each class to its id; other classes do not count.
        precision: the wanted precision, 0 to 1; None if there is none.

    Returns:
        Plain values: ``iou``, ``target_precision``, and ``classes``, a dict from class name to a dict of

        - ``id``: the id of the class;
        - ``objects``: the number of objects without crowds;
        - ``best_f1``: the point of the highest F1, of several the one of the highest threshold; None if no object was
          found;
        - ``precision``: the point of the lowest threshold whose precision is at least the wanted one; None if there is
          no such threshold.

        A point is a dict of ``threshold``, ``precision``, ``recall`` and ``f1``. Detections whose score is at least the
        threshold count.
    """
    images = found.evaluated
    ids = np.array(list(categories.values()), dtype=np.int64)
    order = ids.argsort()

    def groups(of_image: np.ndarray, of_category: np.ndarray) -> np.ndarray:
        """One number per pair of image and class."""
        return np.searchsorted(images, of_image) * len(ids) + order[np.searchsorted(ids, of_category, sorter=order)]

    object_images = annotations.image_ids[annotations.image_rows]
    object_categories = np.array(annotations.category_ids, dtype=np.int64)[annotations.labels - 1]
    counted = np.isin(object_images, images) & np.isin(object_categories, ids)
    object_groups = groups(object_images[counted], object_categories[counted])
    crowds = annotations.crowds[counted]
    found_groups = groups(found.image_ids, found.category_ids)
    scores = found.scores

    outcomes = match(found_groups, found.boxes, scores, object_groups, annotations.xywh[counted], crowds)
    objects = np.bincount(object_groups[~crowds] % len(ids), minlength=len(ids))
    classes = found_groups % len(ids)
    return {
        "iou": IOU,
        "target_precision": precision,
        "classes": {
            name: {
                "id": category_id,
                **points(scores[classes == k], outcomes[classes == k], int(objects[k]), precision),
            }
            for k, (name, category_id) in enumerate(categories.items())
        },
    }


def points(scores: np.ndarray, outcomes: np.ndarray, objects: int, precision: float | None) -> dict[str, Any]:
    """The operating points of one class.

    Args:
        scores: (D,).
        outcomes: (D,) of :func:`match`.
        objects: the number of objects without crowds.
        precision: the wanted precision; None if there is none.

    Returns:
        ``objects``, ``best_f1`` and ``precision``, see :func:`operating_points`.
    """
    counted = outcomes != IGNORED
    scores, hits = scores[counted], outcomes[counted] == TRUE_POSITIVE
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], hits[order].cumsum()
    # A threshold keeps all detections with the same score.
    last = np.append(scores[1:] != scores[:-1], True)[: len(scores)].nonzero()[0]
    scores, found, kept = scores[last], found[last], last + 1
    precisions, f1 = found / kept, 2 * found / (kept + objects)

    def point(index: int) -> dict[str, float]:
        return {
            "threshold": float(scores[index]),
            "precision": float(precisions[index]),
            "recall": float(found[index] / objects),
            "f1": float(f1[index]),
        }

    reaches = [] if precision is None or not objects else (precisions >= precision).nonzero()[0]
    return {
        "objects": objects,
        "best_f1": point(int(f1.argmax())) if found.any() else None,
        "precision": point(int(reaches[-1])) if len(reaches) else None,
    }
