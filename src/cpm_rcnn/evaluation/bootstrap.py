"""Bootstrap over images: COCO's average precision of many resampled sets of images.

Detections and objects are matched once, because what happens in an image does not depend on the other images. A
resample is a weight per image: how often the image was drawn. Only the sums along the ranking of the detections depend
on the weights.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpm_rcnn.evaluation.engines import EvaluationData
from cpm_rcnn.evaluation.matching import best_pairs, overlapping_pairs

# The metrics that are resampled.
AP_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# As pycocotools computes them.
IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
_LIMIT = 100  # detections per image and class
# Numbers in the temporary arrays of one block of resamples, which bounds the memory and keeps them in the cache.
_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class _Ranking:
    """The ranked detections of one class that decide its precision in one area range.

    D detections count as true or false positives at every IoU threshold unless they are matched; these are the
    detections whose own area is in the range. Matches change this for few detections.

    Attributes:
        object_images: the image of each object that counts.
        images: (D,) the image of each detection in the range, best score first.
        hits: per IoU threshold, the images (E,) of the true positives, best score first.
        base: per IoU threshold, (E,) how many of the D detections are ranked up to each true positive.
        changes: per IoU threshold, the images (X,) of the detections that the matching adds or removes.
        signs: per IoU threshold, (X,) 1 for added and -1 for removed detections.
        changed: per IoU threshold, (E,) how many of these are ranked up to each true positive.
    """

    object_images: np.ndarray
    images: np.ndarray
    hits: list[np.ndarray]
    base: list[np.ndarray]
    changes: list[np.ndarray]
    signs: list[np.ndarray]
    changed: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Matches:
    """The matches of one set of detections, from which the metrics of any weights of the images follow.

    Attributes:
        images: number of images.
        rankings: one list per class with one ranking per area range (all, small, medium, large).
    """

    images: int
    rankings: list[list[_Ranking]]


def match_all(data: EvaluationData) -> Matches:
    """Match detections with objects for all classes, area ranges and IoU thresholds, as pycocotools does it."""
    # Groups of class and image. They ascend with the class, then with the image.
    object_groups = data.object_categories * (data.images + 1) + data.object_images
    by_group = np.argsort(object_groups, kind="stable")
    object_groups, object_boxes = object_groups[by_group], data.object_boxes[by_group]
    object_areas, crowds = data.object_areas[by_group], data.object_crowds[by_group]
    groups = data.found_categories * (data.images + 1) + data.found_images
    order = np.lexsort((-data.found_scores, groups))
    sorted_groups = groups[order]
    order = order[np.arange(len(order)) - np.searchsorted(sorted_groups, sorted_groups) < _LIMIT]
    groups, boxes, scores = groups[order], data.found_boxes[order], data.found_scores[order]

    pairs = overlapping_pairs(groups, boxes, object_groups, object_boxes, crowds, IOUS[0])
    rows, objects, overlaps = (np.concatenate(part) for part in zip(*pairs))
    ranks = rows - np.searchsorted(groups, groups[rows])
    found_areas = boxes[:, 2] * boxes[:, 3]
    classes, images = np.divmod(groups, data.images + 1)
    object_classes, object_images = np.divmod(object_groups, data.images + 1)
    # Equal scores of a class are ranked by image, and of an image by their order there.
    ranking = np.lexsort((-scores, classes))
    position = np.empty_like(ranking)
    position[ranking] = np.arange(len(ranking))
    firsts = np.searchsorted(classes, np.arange(1, data.categories + 2))

    rankings: list[list[_Ranking]] = [[] for _ in range(data.categories)]
    for low, high in AREAS:
        ignored = crowds | (object_areas < low) | (object_areas > high)
        inside = (found_areas >= low) & (found_areas <= high)
        # Of a detection, its best pair is the last: objects that count come after ignored ones.
        preference = np.lexsort((objects, overlaps, ~ignored[objects], rows, ranks))
        matched = []
        for iou in IOUS:
            kept = preference[overlaps[preference] >= min(iou, 1 - 1e-10)]
            matched_rows, matched_objects = best_pairs(rows[kept], objects[kept], ranks[kept], crowds)
            positions = position[matched_rows]
            ascending = np.argsort(positions)
            # Per match in the order of the ranking: its position, and whether it is a true positive.
            matched.append((positions[ascending], ~ignored[matched_objects[ascending]]))
        ranked_inside, ranked_images = inside[ranking], images[ranking] - 1
        for k in range(data.categories):
            counted = ~ignored & (object_classes == k + 1)
            rankings[k].append(
                _ranking(object_images[counted] - 1, firsts[k], firsts[k + 1], ranked_inside, ranked_images, matched)
            )
    return Matches(data.images, rankings)


def _ranking(
    object_images: np.ndarray,
    first: int,
    end: int,
    inside: np.ndarray,
    images: np.ndarray,
    matched: list[tuple[np.ndarray, np.ndarray]],
) -> _Ranking:
    """The ranking of the class whose detections are at the positions ``first`` to ``end``."""
    places = first + inside[first:end].nonzero()[0]
    found = _Ranking(object_images, images[places], [], [], [], [], [])
    for positions, positive in matched:
        mine = slice(*np.searchsorted(positions, (first, end)))
        positions, positive = positions[mine], positive[mine]
        hits = positions[positive]
        # True positives count whatever their own area; matches with ignored objects never count.
        changes = positions[positive != inside[positions]]
        found.hits.append(images[hits])
        found.base.append(np.searchsorted(places, hits, side="right"))
        found.changes.append(images[changes])
        found.signs.append(np.where(inside[changes], -1, 1).astype(np.int32))
        found.changed.append(np.searchsorted(changes, hits, side="right"))
    return found


def average_precisions(matches: Matches, weights: np.ndarray, by_area: bool = True) -> np.ndarray:
    """COCO's average precision of weighted images.

    Equal to what pycocotools computes if each image is repeated as often as its weight says, with its repetitions one
    after another. The one exception: detections of equal score, class and image may be ranked in another order.

    Args:
        matches: the return value of :func:`match_all`.
        weights: (R, I) integers; a row is a resample of the images.
        by_area: whether the area ranges small, medium and large are computed in addition to all areas.

    Returns:
        (R, 4, 10, K) for the area ranges (all, small, medium, large), IoU thresholds and classes, or (R, 1, 10, K); NaN
        if there are no objects.
    """
    weights = np.ascontiguousarray(weights, dtype=np.int32)
    areas = len(AREAS) if by_area else 1
    values = np.full((len(weights), areas, len(IOUS), len(matches.rankings)), np.nan)
    for k, of_class in enumerate(matches.rankings):
        longest = max(len(of_class[0].images), len(of_class[0].object_images), 1)
        step = max(1, _BLOCK // longest)
        for start in range(0, len(weights), step):
            block = weights[start : start + step]
            for area, ranking in enumerate(of_class[:areas]):
                values[start : start + step, area, :, k] = _of_block(ranking, block)
    return values


def _of_block(ranking: _Ranking, weights: np.ndarray) -> np.ndarray:
    """(R, 10) the average precisions of one class and area range; NaN where no object counts."""
    objects = weights.take(ranking.object_images, axis=1).sum(axis=1)
    values = np.zeros((len(weights), len(IOUS)))
    values[objects == 0] = np.nan
    if not len(ranking.object_images):
        return values
    # Rows without objects are computed too and stay NaN.
    divisor = np.maximum(objects, 1)[:, None]
    counts = _cumulative(weights.take(ranking.images, axis=1))
    for t, images in enumerate(ranking.hits):
        if not len(images):
            continue
        found = weights.take(images, axis=1).cumsum(axis=1, dtype=np.int32)
        kept = counts.take(ranking.base[t], axis=1)
        if len(ranking.changes[t]):
            changes = _cumulative(weights.take(ranking.changes[t], axis=1) * ranking.signs[t])
            kept += changes.take(ranking.changed[t], axis=1)
        precision = found / (kept + np.spacing(1))
        # The best precision at this or any higher recall.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # How many of the 101 recalls each true positive is the first to reach.
        reached = _RECALLS.searchsorted(found / divisor, side="right")
        reached[:, 1:] -= reached[:, :-1].copy()
        values[:, t] += np.einsum("re,re->r", precision, reached) / len(_RECALLS)
    return values


def _cumulative(values: np.ndarray) -> np.ndarray:
    """(R, N + 1) the sums of the first 0 to N values of each row."""
    sums = np.zeros((len(values), values.shape[1] + 1), dtype=np.int32)
    values.cumsum(axis=1, out=sums[:, 1:])
    return sums


def ap_metrics(values: np.ndarray) -> np.ndarray:
    """(R, 6) the metrics of :data:`AP_METRICS` from what :func:`average_precisions` returns; NaN if undefined."""
    parts = [values[:, 0], values[:, 0, :1], values[:, 0, 5:6], values[:, 1], values[:, 2], values[:, 3]]
    return np.stack([_mean(part.reshape(len(part), -1)) for part in parts], axis=1)


def class_metrics(values: np.ndarray) -> np.ndarray:
    """(R, K) the AP of each class from the return value of :func:`average_precisions`; NaN if undefined."""
    return values[:, 0].mean(axis=1)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean of the defined values of each row; NaN if there are none."""
    defined = ~np.isnan(values)
    number = defined.sum(axis=1)
    sums = np.where(defined, values, 0).sum(axis=1)
    return np.divide(sums, number, out=np.full(len(values), np.nan), where=number > 0)


def resample_weights(images: int, samples: int, seed: int) -> np.ndarray:
    """(samples, images) int32: how often each image was drawn in each resample, with replacement."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, images, images) for _ in range(samples))
    return np.stack([np.bincount(drawn, minlength=images) for drawn in draws]).astype(np.int32)


def compare_matches(
    runs: list[Matches], classes: list[str], samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """The metrics of runs on the same images, their differences from the first run, and their intervals.

    The same resamples of the images are used for all runs.

    Args:
        runs: the matches of each run.
        classes: the names of the K classes.
        samples: number of resamples.
        seed: random seed of the resamples.
        confidence: share of the resamples inside an interval.

    Returns:
        Per run, a dict of ``metrics`` (by name) and ``per_class`` (AP by class). A metric is a dict of ``value``,
        ``low`` and ``high``, from 0 to 1; except for the first run, ``difference`` is a dict of the same keys. NaN
        stands for undefined values. Resamples in which a metric is undefined, for example because they have no image
        with the class, are left out of its interval.
    """
    images = runs[0].images
    weights = np.concatenate([np.ones((1, images), np.int32), resample_weights(images, samples, seed)])
    tables = []
    for matches in runs:
        values = average_precisions(matches, weights)
        tables.append(np.concatenate([ap_metrics(values), class_metrics(values)], axis=1))
    results = []
    for number, table in enumerate(tables):
        columns = [_interval(column, confidence) for column in table.T]
        if number:
            for result, column in zip(columns, (table - tables[0]).T):
                result["difference"] = _interval(column, confidence)
        split = len(AP_METRICS)
        results.append(
            {"metrics": dict(zip(AP_METRICS, columns[:split])), "per_class": dict(zip(classes, columns[split:]))}
        )
    return results


def _interval(column: np.ndarray, confidence: float) -> dict[str, Any]:
    """The estimate, which is the first value, and the percentile interval of the others, shifted to it.

    The AP of a resample, in which images are repeated, is higher on average than that of all images. The interval is
    shifted so that the median of the resamples is at the estimate.
    """
    value, resampled = float(column[0]), column[1:][~np.isnan(column[1:])]
    if not len(resampled):
        return {"value": value, "low": float("nan"), "high": float("nan")}
    tail = 50 * (1 - confidence)
    low, median, high = np.percentile(resampled, (tail, 50, 100 - tail))
    return {"value": value, "low": value + float(low - median), "high": value + float(high - median)}
