"""What became of each detection and of each object."""

from dataclasses import dataclass

import numpy as np

from cpm_rcnn.evaluation.engines import EvaluationData
from cpm_rcnn.evaluation.matching import IOU, match_objects, overlapping_pairs

# The first is a true positive; the last is a detection in a crowd, which counts neither as a hit nor as an error. The
# others are TIDE's kinds of false positives (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
# Errors", section 3).
KINDS = ("correct", "classification", "localization", "both", "duplicate", "background", "ignored")
CORRECT, CLASSIFICATION, LOCALIZATION, BOTH, DUPLICATE, BACKGROUND, IGNORED = range(len(KINDS))
# Below this IoU, a detection and an object have nothing to do with each other.
BACKGROUND_IOU = 0.1


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Outcomes of D detections and A objects. Crowds are not objects here: they never appear in ``nearest``.

    Attributes:
        kinds: (D,) int64, index in :data:`KINDS`.
        matched: (D,) int64, the row of the object that the detection takes; -1 unless it is correct.
        ious: (D,) float64, the highest IoU with an object of the same class; 0 if there is none.
        nearest: (D,) int64, the row of the object of any class with the highest IoU; -1 if it overlaps none.
        nearest_ious: (D,) float64, that IoU.
        found: (A,) bool, the objects that a detection takes.
        reached: (A,) float64, the highest IoU of the object with a detection of any class.
    """

    kinds: np.ndarray
    matched: np.ndarray
    ious: np.ndarray
    nearest: np.ndarray
    nearest_ious: np.ndarray
    found: np.ndarray
    reached: np.ndarray


def find_outcomes(data: EvaluationData) -> Outcomes:
    """Match the detections at IoU 0.5 and classify the false positives as TIDE does.

    Unlike in COCO's metrics, the number of detections per image is not limited.
    """
    crowds = data.object_crowds
    number = len(data.found_scores)
    taken = match_objects(
        data.found_images * (data.categories + 1) + data.found_categories,
        data.found_boxes,
        data.found_scores,
        data.object_images * (data.categories + 1) + data.object_categories,
        data.object_boxes,
        crowds,
    )
    in_crowd = (taken >= 0) & (np.append(crowds, False)[taken])
    matched = np.where(in_crowd, -1, taken)

    rows, objects, overlaps = _pairs(data)
    same = data.found_categories[rows] == data.object_categories[objects]
    ious, other_ious = np.zeros(number), np.zeros(number)
    np.maximum.at(ious, rows[same], overlaps[same])
    np.maximum.at(other_ious, rows[~same], overlaps[~same])
    reached = np.zeros(len(crowds))
    np.maximum.at(reached, objects, overlaps)
    # Of each detection, the last pair in this order is the best.
    order = np.lexsort((overlaps, rows))
    nearest, nearest_ious = np.full(number, -1), np.zeros(number)
    nearest[rows[order]], nearest_ious[rows[order]] = objects[order], overlaps[order]

    kinds = np.select(
        [
            matched >= 0,
            in_crowd,
            (ious >= BACKGROUND_IOU) & (ious < IOU),
            other_ious >= IOU,
            ious >= IOU,
            nearest_ious < BACKGROUND_IOU,
        ],
        [CORRECT, IGNORED, LOCALIZATION, CLASSIFICATION, DUPLICATE, BACKGROUND],
        BOTH,
    )
    found = np.zeros(len(crowds), dtype=bool)
    found[matched[matched >= 0]] = True
    return Outcomes(kinds, matched, ious, nearest, nearest_ious, found, reached)


def _pairs(data: EvaluationData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of detection and object, and the IoU, of all overlapping pairs in an image, whatever their classes."""
    objects = (~data.object_crowds).nonzero()[0]
    objects = objects[np.argsort(data.object_images[objects], kind="stable")]
    boxes = data.object_boxes[objects]
    smallest = np.finfo(np.float64).tiny
    pairs = overlapping_pairs(
        data.found_images, data.found_boxes, data.object_images[objects], boxes, np.zeros(len(objects), bool), smallest
    )
    rows, positions, overlaps = (np.concatenate(part) for part in zip(*pairs))
    return rows, objects[positions], overlaps
