"""Matching of detections to objects and COCO's precision and recall, by hotcoco or by pycocotools."""

import contextlib
import io
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

# The twelve metrics of COCO, in the order of pycocotools' ``COCOeval.stats``.
METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """Objects and detections of the evaluated images, in arrays.

    Images and categories have numbers from 1 instead of their ids. The numbers must ascend with the ids, because
    pycocotools processes images and categories in ascending order, which decides how equal scores are sorted. Objects
    and detections of the same image and category are processed in the order of the arrays.

    I, K, A and N are the numbers of images, categories, objects and detections.

    Attributes:
        images: I; the images are 1..I.
        categories: K; the categories are 1..K.
        object_images: (A,) int64, 1..I.
        object_categories: (A,) int64, 1..K.
        object_boxes: (A, 4) float64 x, y, width, height in pixels.
        object_areas: (A,) float64 square pixels.
        object_crowds: (A,) bool.
        found_images: (N,) int64, 1..I.
        found_categories: (N,) int64, 1..K.
        found_boxes: (N, 4) float64 x, y, width, height in pixels.
        found_scores: (N,) float64.
    """

    images: int
    categories: int
    object_images: np.ndarray
    object_categories: np.ndarray
    object_boxes: np.ndarray
    object_areas: np.ndarray
    object_crowds: np.ndarray
    found_images: np.ndarray
    found_categories: np.ndarray
    found_boxes: np.ndarray
    found_scores: np.ndarray


class _Threads:
    """Whether hotcoco has started its threads, and whether this process is a fork that lacks them."""

    started = False
    lost = False

    @classmethod
    def after_fork(cls) -> None:
        cls.lost = cls.started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Threads.after_fork)


def precision_and_recall(data: EvaluationData) -> tuple[np.ndarray, np.ndarray]:
    """COCO's precision and recall, bit for bit as pycocotools computes them.

    hotcoco computes them. pycocotools, which takes much longer, replaces it in three cases: hotcoco is not installed
    (its wheels cover fewer platforms than torch's), a score is NaN (hotcoco refuses it), or this process is a fork of a
    process that has used hotcoco (its threads do not exist in the fork, and a call would never return).

    Returns:
        Precision (10 IoU thresholds, 101 recalls, K, 4 area ranges, 3 limits of detections per image) and recall
        (10, K, 4, 3), float64. -1 stands for "no objects".
    """
    if not data.images or not data.categories:
        return np.full((10, 101, data.categories, 4, 3), -1.0), np.full((10, data.categories, 4, 3), -1.0)
    if hotcoco_refusal(data) is not None:
        return by_pycocotools(data)
    try:
        return by_hotcoco(data)
    except ImportError:
        _warn_without_hotcoco()
        return by_pycocotools(data)


@cache
def _warn_without_hotcoco() -> None:
    """Log once that evaluations are slow."""
    _log.warning("hotcoco is not installed: pycocotools evaluates, with equal metrics but about 50 times as slowly")


def hotcoco_refusal(data: EvaluationData) -> str | None:
    """Why hotcoco cannot evaluate ``data`` in this process even if it is installed; None if it can."""
    if _Threads.lost:
        return "this process is a fork of one that has used hotcoco"
    return "a score is NaN" if np.isnan(data.found_scores).any() else None


def by_hotcoco(data: EvaluationData) -> tuple[np.ndarray, np.ndarray]:
    """:func:`precision_and_recall` by hotcoco.

    Raises:
        ImportError: hotcoco is not installed.
    """
    evaluator = hotcoco_evaluator(data)
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def hotcoco_evaluator(data: EvaluationData) -> Any:
    """A ``COCOeval`` of hotcoco for the data, before its ``evaluate``.

    Raises:
        ImportError: hotcoco is not installed.
    """
    from hotcoco import COCO, COCOeval

    _Threads.started = True
    truth = COCO.from_arrays(
        [{"id": number} for number in range(1, data.images + 1)],
        [{"id": number, "name": str(number)} for number in range(1, data.categories + 1)],
        data.object_images,
        data.object_categories,
        data.object_boxes,
        area=data.object_areas,
        iscrowd=data.object_crowds,
    )
    rows = np.empty((len(data.found_scores), 7))
    rows[:, 0] = data.found_images
    rows[:, 1:5] = data.found_boxes
    rows[:, 5] = data.found_scores
    rows[:, 6] = data.found_categories
    return COCOeval(truth, truth.load_res(rows), "bbox")


def by_pycocotools(data: EvaluationData) -> tuple[np.ndarray, np.ndarray]:
    """:func:`precision_and_recall` by pycocotools, the reference."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def coco(annotations: list[dict[str, Any]]) -> Any:
        built = COCO()
        built.dataset = {
            "images": [{"id": number} for number in range(1, data.images + 1)],
            "categories": [{"id": number} for number in range(1, data.categories + 1)],
            "annotations": annotations,
        }
        built.createIndex()
        return built

    objects = _dicts(
        image_id=data.object_images,
        category_id=data.object_categories,
        bbox=data.object_boxes,
        area=data.object_areas,
        iscrowd=data.object_crowds.astype(np.int64),
    )
    found = _dicts(
        image_id=data.found_images,
        category_id=data.found_categories,
        bbox=data.found_boxes,
        area=data.found_boxes[:, 2] * data.found_boxes[:, 3],
        iscrowd=np.zeros(len(data.found_scores), np.int64),
        score=data.found_scores,
    )
    # pycocotools reports its progress on stdout, which belongs to the commands.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco(objects), coco(found), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _dicts(**columns: np.ndarray) -> list[dict[str, Any]]:
    """One dict per row, with an ``id`` from 1: pycocotools can never match an object of id 0."""
    names = list(columns)
    rows = zip(*(column.tolist() for column in columns.values()))
    return [{"id": number, **dict(zip(names, row))} for number, row in enumerate(rows, start=1)]


def summarize(precision: np.ndarray, recall: np.ndarray) -> list[float]:
    """The metrics of :data:`METRIC_NAMES`, bit for bit equal to pycocotools' ``COCOeval.stats``.

    Args:
        precision: the first return value of :func:`precision_and_recall`.
        recall: the second.
    """
    precision = precision[..., 2]  # 100 detections per image
    values = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
    values += [precision[..., area] for area in (1, 2, 3)]
    values += [recall[..., 0, limit] for limit in range(3)]
    values += [recall[..., area, 2] for area in (1, 2, 3)]
    return [mean_of_defined(value) for value in values]


def mean_of_defined(values: np.ndarray) -> float:
    """The mean of the entries above -1, which stands for "no objects"; -1 if there are none."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0
