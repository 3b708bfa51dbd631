"""Annotations that look wrong, because a confident detection contradicts them or no detection reaches them."""

from typing import Any

import numpy as np
import torch

from cpm_rcnn.evaluation.analysis.outcomes import (
    BACKGROUND,
    BACKGROUND_IOU,
    BOTH,
    CLASSIFICATION,
    CORRECT,
    LOCALIZATION,
    Outcomes,
)
from cpm_rcnn.evaluation.analysis.split import EvaluatedSplit
from cpm_rcnn.evaluation.matching import IOU, overlapping_pairs
from cpm_rcnn.models.nms import grouped_nms

OTHER_CLASS, NOT_ANNOTATED = "other_class", "not_annotated"
DUPLICATE_LABEL, NEVER_DETECTED = "duplicate", "never_detected"
SHOWN = 16  # of each kind
# Two annotations that overlap this much are probably of one object.
_SAME_OBJECT_IOU = 0.8
# A confident detection near another detected object has an object of its own if they overlap less than this.
_NEIGHBOR_IOU = 0.3
# Annotations that no detection reaches are only listed for classes of which this share of the objects is found.
_RELIABLE_RECALL = 0.5


def suspicious_labels(split: EvaluatedSplit, outcomes: Outcomes, confident: np.ndarray) -> dict[str, Any]:
    """The annotations to look at first.

    Args:
        split: the evaluated split.
        outcomes: its outcomes.
        confident: (N,) bool, the detections that are trusted more than the annotations.

    Returns:
        ``count``; ``counts`` by kind; and ``list``, at most 16 of each kind:

        - ``other_class``: a confident detection of another class at the place of an annotation that no confident
          detection confirms;
        - ``not_annotated``: a confident detection without an annotation;
        - ``duplicate``: two annotations of what is probably one object;
        - ``never_detected``: an annotation that no detection of any class overlaps with IoU 0.1 or more.

        Each is a dict of ``image_id``, ``file_name``, ``width``, ``height``, ``kind``, ``class`` and ``score`` of the
        detection, ``box``, ``annotated`` (the class of the annotation), ``annotated_box`` and ``text``; None where
        there is no detection or no annotation.
    """
    found: list[tuple[str, list[dict[str, Any]]]] = [
        (OTHER_CLASS, _other_class(split, outcomes, confident)),
        (NOT_ANNOTATED, _not_annotated(split, outcomes, confident)),
        (DUPLICATE_LABEL, _duplicates(split)),
        (NEVER_DETECTED, _never_detected(split, outcomes)),
    ]
    return {
        "count": sum(len(entries) for _, entries in found),
        "counts": {kind: len(entries) for kind, entries in found},
        "list": [{"kind": kind, **entry} for kind, entries in found for entry in entries[:SHOWN]],
    }


def _confirmed(outcomes: Outcomes, confident: np.ndarray) -> np.ndarray:
    """(A + 1,) bool, the objects that a confident detection takes; the last entry, for row -1, is False."""
    confirmed = np.zeros(len(outcomes.found) + 1, dtype=bool)
    confirmed[outcomes.matched[confident & (outcomes.kinds == CORRECT)]] = True
    return confirmed


def _other_class(split: EvaluatedSplit, outcomes: Outcomes, confident: np.ndarray) -> list[dict[str, Any]]:
    confirmed = _confirmed(outcomes, confident)
    wrong = confident & (outcomes.kinds == CLASSIFICATION) & ~confirmed[outcomes.nearest]
    entries = []
    for row in _best_per_place(split, wrong):
        entry = _entry(split, row, int(outcomes.nearest[row]))
        text = f"annotated as {entry['annotated']}, detected as {entry['class']} with score {entry['score']:.2f}"
        entries.append(entry | {"text": text})
    return entries


def _not_annotated(split: EvaluatedSplit, outcomes: Outcomes, confident: np.ndarray) -> list[dict[str, Any]]:
    confirmed = _confirmed(outcomes, confident)
    beside = np.isin(outcomes.kinds, (LOCALIZATION, BOTH)) & (outcomes.nearest_ious < _NEIGHBOR_IOU)
    beside &= confirmed[outcomes.nearest]
    alone = confident & ((outcomes.kinds == BACKGROUND) | beside)
    entries = []
    for row in _best_per_place(split, alone):
        entry = _entry(split, row, None)
        text = f"detected as {entry['class']} with score {entry['score']:.2f}; nothing is annotated there"
        entries.append(entry | {"text": text})
    return entries


def _duplicates(split: EvaluatedSplit) -> list[dict[str, Any]]:
    data = split.data
    objects = (~data.object_crowds).nonzero()[0]
    objects = objects[np.argsort(data.object_images[objects], kind="stable")]
    boxes, images = data.object_boxes[objects], data.object_images[objects]
    pairs = overlapping_pairs(images, boxes, images, boxes, np.zeros(len(objects), bool), _SAME_OBJECT_IOU)
    first, second, overlaps = (np.concatenate(part) for part in zip(*pairs))
    once = first < second
    first, second, overlaps = first[once], second[once], overlaps[once]
    entries = []
    for i in np.argsort(-overlaps, kind="stable").tolist():
        one, two = int(objects[first[i]]), int(objects[second[i]])
        entry = _entry(split, None, one) | {"box": data.object_boxes[two].tolist()}
        other = split.class_names[data.object_categories[two] - 1]
        names = entry["annotated"] if entry["annotated"] == other else f"{entry['annotated']} and {other}"
        entries.append(entry | {"text": f"annotated twice, as {names} (IoU {overlaps[i]:.2f})"})
    return entries


def _never_detected(split: EvaluatedSplit, outcomes: Outcomes) -> list[dict[str, Any]]:
    data = split.data
    objects = ~data.object_crowds
    classes = data.object_categories
    totals = np.bincount(classes[objects], minlength=data.categories + 1)
    recall = np.bincount(classes[outcomes.found], minlength=data.categories + 1) / np.maximum(totals, 1)
    rows = (objects & (outcomes.reached < BACKGROUND_IOU) & (recall[classes] >= _RELIABLE_RECALL)).nonzero()[0]
    # Large ones first: small objects are missed more often.
    rows = rows[np.argsort(-data.object_areas[rows], kind="stable")]
    entries = []
    for row in rows.tolist():
        entry = _entry(split, None, row)
        entries.append(entry | {"text": f"annotated as {entry['annotated']}; nothing is detected there"})
    return entries


def _best_per_place(split: EvaluatedSplit, chosen: np.ndarray) -> list[int]:
    """The rows of the chosen detections (N,) bool, best score first, without those on top of a better one."""
    rows = chosen.nonzero()[0]
    boxes = split.data.found_boxes[rows]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    scores, images = split.data.found_scores[rows], split.data.found_images[rows]
    tensors = [torch.from_numpy(each) for each in (corners, scores, images)]
    kept, _ = grouped_nms(tensors[0], tensors[1], tensors[2], IOU, torch.ones(len(rows), dtype=torch.bool))
    return rows[kept.numpy()].tolist()


def _entry(split: EvaluatedSplit, detection: int | None, annotation: int | None) -> dict[str, Any]:
    data = split.data
    images = data.object_images if detection is None else data.found_images
    image = int(images[annotation if detection is None else detection]) - 1
    width, height = split.sizes[image].tolist()
    annotated_box = None if annotation is None else data.object_boxes[annotation].tolist()
    return {
        "image_id": int(split.image_ids[image]),
        "file_name": str(split.file_names[image]),
        "width": width,
        "height": height,
        "class": None if detection is None else split.class_names[data.found_categories[detection] - 1],
        "score": None if detection is None else float(data.found_scores[detection]),
        "box": annotated_box if detection is None else data.found_boxes[detection].tolist(),
        "annotated": None if annotation is None else split.class_names[data.object_categories[annotation] - 1],
        "annotated_box": annotated_box,
    }
