"""Matching of detections and objects, as pycocotools does it, for all images and classes at once."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

# The lowest IoU of a match where there is only one.
IOU = 0.5
# What becomes of a detection.
TRUE_POSITIVE, FALSE_POSITIVE, IGNORED = 1, 0, -1
# Pairs of detection and object whose IoU is computed at once, which bounds the memory of crowded images.
_CHUNK = 1 << 20


def match(
    groups: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    object_groups: np.ndarray,
    object_boxes: np.ndarray,
    crowds: np.ndarray,
    iou: float = IOU,
) -> np.ndarray:
    """Match detections with objects, best score first, as pycocotools does it.

    A detection takes the object of its group that overlaps it most, among those that no better-scored detection has
    taken. If there is none, and it overlaps a crowd, it is ignored.

    All groups are processed in parallel, one detection per group and round.

    Args:
        groups: (D,) int64; a group is an image and a class.
        boxes: (D, 4) float64, x, y, width, height.
        scores: (D,). Of detections with the same score, the first one comes first.
        object_groups: (G,) int64.
        object_boxes: (G, 4) float64.
        crowds: (G,) bool. A crowd can be matched by several detections; its IoU is the share of the detection inside.
        iou: the lowest IoU of a match.

    Returns:
        (D,) int8: ``TRUE_POSITIVE``, ``FALSE_POSITIVE`` or ``IGNORED``.
    """
    objects = match_objects(groups, boxes, scores, object_groups, object_boxes, crowds, iou)
    outcomes = np.full(len(groups), FALSE_POSITIVE, dtype=np.int8)
    matched = objects >= 0
    outcomes[matched] = np.where(crowds[objects[matched]], IGNORED, TRUE_POSITIVE)
    return outcomes


def match_objects(
    groups: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    object_groups: np.ndarray,
    object_boxes: np.ndarray,
    crowds: np.ndarray,
    iou: float = IOU,
) -> np.ndarray:
    """The object or crowd that each detection takes; see :func:`match`.

    Returns:
        (D,) int64 rows of the objects, -1 where there is none.
    """
    matched = np.full(len(groups), -1)
    # Of a group, objects come before crowds.
    object_order = np.lexsort((crowds, object_groups))
    object_groups, object_boxes, crowds = object_groups[object_order], object_boxes[object_order], crowds[object_order]
    # Both sorts are stable.
    order = np.lexsort((-scores, groups))
    order = order[np.isin(groups[order], object_groups)]
    found_pairs = overlapping_pairs(
        groups[order], boxes[order], object_groups, object_boxes, crowds, min(iou, 1 - 1e-10)
    )
    rows, objects, overlaps = (np.concatenate(part) for part in zip(*found_pairs))

    # The rank of a detection among those of its group that overlap anything.
    candidates, positions = np.unique(rows, return_inverse=True)
    candidate_groups = groups[order[candidates]]
    ranks = np.arange(len(candidates)) - np.searchsorted(candidate_groups, candidate_groups)
    # Of a detection, its best pair is the last. Of equal pairs, pycocotools takes the last object.
    by_rank = np.lexsort((objects, overlaps, ~crowds[objects], rows, ranks[positions]))
    rows, objects = rows[by_rank], objects[by_rank]
    matched_rows, matched_objects = best_pairs(rows, objects, ranks[positions][by_rank], crowds)
    matched[order[matched_rows]] = object_order[matched_objects]
    return matched


def best_pairs(
    rows: np.ndarray, objects: np.ndarray, ranks: np.ndarray, crowds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the object of each detection, in the order of the ranks.

    Args:
        rows: (P,) int64, the detection of each pair. The pairs are sorted by rank, then by detection, then by
            preference: of a detection's pairs, the last one whose object is free is chosen.
        objects: (P,) int64, the object of each pair.
        ranks: (P,) int64 from 0, the rank of each pair's detection among those that compete with it for objects.
        crowds: (G,) bool. Several detections can choose the same crowd.

    Returns:
        The detections that have an object, and their objects.
    """
    starts = np.searchsorted(ranks, np.arange(ranks.max(initial=-1) + 2))
    taken = np.zeros(len(crowds), dtype=bool)
    chosen = [(rows[:0], objects[:0])]
    for start, end in pairwise(starts):
        free = ~taken[objects[start:end]]
        round_rows, round_objects = rows[start:end][free], objects[start:end][free]
        best = np.append(round_rows[1:] != round_rows[:-1], True)[: len(round_rows)]
        round_rows, round_objects = round_rows[best], round_objects[best]
        taken[round_objects] = ~crowds[round_objects]
        chosen.append((round_rows, round_objects))
    matched_rows, matched_objects = (np.concatenate(part) for part in zip(*chosen))
    return matched_rows, matched_objects


def overlapping_pairs(
    groups: np.ndarray,
    boxes: np.ndarray,
    object_groups: np.ndarray,
    object_boxes: np.ndarray,
    crowds: np.ndarray,
    iou: float,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The rows of detection and object, and the IoU, of all pairs of one group whose IoU is at least ``iou``."""
    first = np.searchsorted(object_groups, groups)
    counts = np.searchsorted(object_groups, groups, side="right") - first
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(0, total, _CHUNK) + _CHUNK)
    for begin, end in zip([0, *cuts], [*cuts, len(groups)]):
        chunk = np.arange(begin, end)
        rows = chunk.repeat(counts[chunk])
        # Within a detection, its objects are numbered from its first one.
        shift = first[chunk] - (ends[chunk] - counts[chunk])
        objects = np.arange(len(rows)) + (ends[begin - 1] if begin else 0) + shift.repeat(counts[chunk])
        overlaps = _iou(boxes[rows], object_boxes[objects], crowds[objects])
        kept = overlaps >= iou
        yield rows[kept], objects[kept], overlaps[kept]


def _iou(boxes: np.ndarray, objects: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """The IoU of each box with the object of the same row, in the order of operations of pycocotools."""
    low = np.maximum(boxes[:, :2], objects[:, :2])
    sides = np.minimum(boxes[:, :2] + boxes[:, 2:], objects[:, :2] + objects[:, 2:]) - low
    overlap = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
    area = boxes[:, 2] * boxes[:, 3]
    union = np.where(crowds, area, area + objects[:, 2] * objects[:, 3] - overlap)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)
