"""COCO's twelve metrics, gathered over all processes."""

import contextlib
import io
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cpm_rcnn.boxes import CONTINUOUS, BoxConvention
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.validation import check_categories
from cpm_rcnn.errors import UserError
from cpm_rcnn.evaluation.operating_points import operating_points
from cpm_rcnn.models.structures import DETAILS

# In the order of pycocotools' ``COCOeval.stats``.
METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# The keys of details in COCO's results format, which has one dict per detection.
RESULT_KEYS = {"class_scores": "class_score", "predicted_iou": "predicted_iou", "rsm_probability": "rsm_probability"}


class CocoMetric(Metric):
    """Average precision and recall exactly as pycocotools computes them.

    Crowds and areas (those of masks, if the file has masks) count as COCO defines, and objects that training ignores
    count too. Only images passed to :meth:`update` are evaluated. If an image was passed more than once, for
    example because a distributed sampler repeats images to fill the last batch, only the first occurrence counts, in
    the order of the ranks.

    The values of the file's ids do not change the metrics. The engines get numbers from 1 instead, because they can
    never match an object of id 0, and faster-coco-eval mishandles negative ids and ids above 2**53.

    Call ``update`` for each batch and ``compute`` at the end, in all processes: ``compute`` gathers the detections of
    all processes, so that its return value, and that of ``results`` afterwards, is complete in each. Log the numbers
    instead of the metric object, because a nested dict cannot be logged, and then call ``reset``.

    Your own metric can replace this one if it is a ``torchmetrics.Metric`` with these three methods:

    - ``update(image_ids, detections)`` adds a batch of detections in pixels of the original images;
    - ``compute()`` returns a dict of floats, in which ``per_class`` may be a dict from class name to float;
    - ``results()`` returns the gathered detections in COCO's results format after ``compute``.

    Args:
        annotations: the ground truth. If it only lists images (``has_annotations`` is False, as for COCO's test-dev),
            there are results but all metrics are NaN.
        categories: the category of each label, with ``id`` and ``name``: label l means ``categories[l - 1]``. If
            several have the same name, ``per_class`` appends their ids. Those that the annotation file does not list
            are neither evaluated nor part of the results.
        convention: convention of the boxes of the detections.
        details: whether the columns of :data:`~cpm_rcnn.models.structures.DETAILS` are kept, and are part of the
            results under the names in :data:`RESULT_KEYS`.

    Raises:
        ArgumentError: ``categories`` is invalid.
    """

    full_state_update = False

    # List states, concatenated over processes; ``counts`` is the number of detections of each image.
    image_ids: list[Tensor]
    counts: list[Tensor]
    boxes: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]
    details: list[Tensor]

    def __init__(
        self,
        annotations: CocoAnnotations,
        categories: Sequence[dict[str, Any]],
        convention: BoxConvention = CONTINUOUS,
        details: bool = False,
    ) -> None:
        super().__init__()
        self.annotations = annotations
        self.convention = convention
        check_categories("categories", categories)
        self.category_ids = [int(category["id"]) for category in categories]
        occurrences = Counter(category["name"] for category in categories)
        self.category_names = [
            category["name"] if occurrences[category["name"]] == 1 else f"{category['name']} ({category['id']})"
            for category in categories
        ]
        # Categories that the model knows and the file does not list are not reported.
        listed = dict(zip(annotations.category_ids, annotations.listed.tolist()))
        self._reported = [listed.get(key, True) for key in self.category_ids]
        self._known_ids = set(annotations.image_ids.tolist())
        self._results: list[dict[str, Any]] | None = None
        self._evaluated: list[int] = []
        for state in ("image_ids", "counts", "boxes", "scores", "labels"):
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self._keeps_details = details
        if details:
            # (N, 3), with NaN in the columns that the head does not have.
            self.add_state("details", default=[], dist_reduce_fx="cat")

    def update(self, image_ids: Sequence[int], detections: Sequence[dict[str, Tensor]]) -> None:
        """Add a batch of B images.

        Args:
            image_ids: B COCO ids.
            detections: B dicts, in pixels of the *original* images: ``boxes`` (N, 4) xyxy, ``scores`` (N,), ``labels``
                (N,) in 1..C; N may be 0. Details (N,) may be missing.

        Raises:
            UserError: an image id is not in the annotations.
        """
        for image_id, found in zip(image_ids, detections, strict=True):
            if image_id not in self._known_ids:
                raise UserError(f"{self.annotations.path}: has no image with id {image_id}")
            self.image_ids.append(torch.tensor([image_id], device=self.device))
            self.counts.append(torch.tensor([len(found["scores"])], device=self.device))
            self.boxes.append(found["boxes"].detach().to(self.device, torch.float32).reshape(-1, 4))
            self.scores.append(found["scores"].detach().to(self.device, torch.float32))
            self.labels.append(found["labels"].detach().to(self.device, torch.int64))
            if self._keeps_details:
                columns = [found.get(name, torch.full_like(found["scores"], math.nan)) for name in DETAILS]
                self.details.append(torch.stack(columns, dim=1).detach().to(self.device, torch.float32))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states over all processes (see ``torchmetrics.Metric.sync``).

        A process without any image contributes empty tensors of the right shape and dtype; without them, gathering
        would fail or never return.
        """
        if not self._is_synced and not self.image_ids:
            for state in (self.image_ids, self.counts, self.labels):
                state.append(torch.zeros(0, dtype=torch.int64, device=self.device))
            self.boxes.append(torch.zeros(0, 4, device=self.device))
            self.scores.append(torch.zeros(0, device=self.device))
            if self._keeps_details:
                self.details.append(torch.zeros(0, len(DETAILS), device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Any]:
        """The metrics over all processes, from 0 to 1.

        Returns:
            The floats ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``AR1``, ``AR10``, ``AR100``, ``ARs``,
            ``ARm``, ``ARl``, and ``per_class``, a dict from category name to its AP. As in pycocotools, a metric is -1
            if there is no object for it. All are NaN without annotations.
        """
        image_ids, self._results = self._gathered()
        self._evaluated = image_ids
        names = list(compress(self.category_names, self._reported))
        category_ids = list(compress(self.category_ids, self._reported))
        if not self.annotations.has_annotations:
            return _metrics([math.nan] * len(METRIC_NAMES), dict.fromkeys(names, math.nan))
        stats, precision = _evaluate(self.annotations, self._results, image_ids, category_ids)
        # The engine sorts the categories by id.
        by_id = {category_id: precision[:, :, k] for k, category_id in enumerate(sorted(category_ids))}
        per_class = {
            name: _mean_of_defined(by_id[category_id]) for name, category_id in zip(names, category_ids, strict=True)
        }
        return _metrics(stats.tolist(), per_class)

    def results(self) -> list[dict[str, Any]]:
        """The detections from which the last metrics were computed, in COCO's results format.

        Returns:
            Dicts of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels) and ``score``, from all
            processes and without duplicate images; not rounded, so that pycocotools computes the same metrics. With
            ``details``, also ``class_score``, ``predicted_iou`` and ``rsm_probability``, if the head has them.

        Raises:
            RuntimeError: :meth:`compute`, which gathers them, was not called before.
        """
        if self._results is None:
            raise RuntimeError("call CocoMetric.compute() before results()")
        return self._results

    def operating_points(self, precision: float | None = None) -> dict[str, Any] | None:
        """Score thresholds of each class for the detections from which the last metrics were computed.

        Needs no other process.

        Args:
            precision: the precision to reach, 0 to 1; None if there is none.

        Returns:
            See :func:`~cpm_rcnn.evaluation.operating_points.operating_points`; None without annotations.

        Raises:
            RuntimeError: :meth:`compute` was not called before.
        """
        results = self.results()
        if not self.annotations.has_annotations:
            return None
        categories = dict(compress(zip(self.category_names, self.category_ids), self._reported))
        return operating_points(self.annotations, results, self._evaluated, categories, precision)

    def _gathered(self) -> tuple[list[int], list[dict[str, Any]]]:
        """The ids of the evaluated images, each once, and their detections in COCO's results format."""
        image_ids: list[int] = dim_zero_cat(self.image_ids).tolist()
        counts = dim_zero_cat(self.counts).tolist()
        boxes = self.convention.to_xywh(dim_zero_cat(self.boxes).cpu().double()).tolist()
        scores = dim_zero_cat(self.scores).tolist()
        labels = dim_zero_cat(self.labels).tolist()
        details = dim_zero_cat(self.details).tolist() if self._keeps_details else [()] * len(labels)
        assert all(1 <= label <= len(self.category_ids) for label in labels), "labels must be in 1..C"

        seen: dict[int, None] = {}
        results = []
        start = 0
        for image_id, count in zip(image_ids, counts, strict=True):
            end = start + count
            if image_id not in seen:
                seen[image_id] = None
                results += [
                    {
                        "image_id": image_id,
                        "category_id": self.category_ids[label - 1],
                        "bbox": bbox,
                        "score": score,
                        **{key: value for key, value in zip(RESULT_KEYS.values(), row) if not math.isnan(value)},
                    }
                    for label, bbox, score, row in zip(*(part[start:end] for part in (labels, boxes, scores, details)))
                    if self._reported[label - 1]
                ]
            start = end
        return list(seen), results


def _metrics(stats: Sequence[float], per_class: dict[str, float]) -> dict[str, Any]:
    return {**dict(zip(METRIC_NAMES, stats, strict=True)), "per_class": per_class}


def _mean_of_defined(precision: np.ndarray) -> float:
    """The mean of the entries above -1, which stands for "no objects"; -1 if there are none."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else -1.0


def _engine() -> tuple[type, type]:
    """The classes COCO and COCOeval of faster-coco-eval if it is installed, otherwise of pycocotools."""
    try:
        return _fast_engine()
    except ImportError:
        return _reference_engine()


def _fast_engine() -> tuple[type, type]:
    from faster_coco_eval.core.coco import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    return COCO, COCOeval_faster


def _reference_engine() -> tuple[type, type]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _evaluate(
    annotations: CocoAnnotations, results: list[dict[str, Any]], image_ids: list[int], category_ids: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Run the engine.

    Args:
        annotations: the ground truth.
        results: detections in COCO's results format.
        image_ids: the images to evaluate.
        category_ids: the categories to evaluate.

    Returns:
        The twelve metrics (12,), and the precision (10 thresholds, 101 recalls, categories by ascending id) for all
        areas and 100 detections per image; float64.
    """
    coco_class, evaluator_class = _engine()
    # Numbers instead of the file's ids. They ascend with the ids, because the engines process images and categories in
    # ascending order, which decides how equal scores are sorted.
    image_numbers = _numbered(annotations.image_ids.tolist())
    category_numbers = _numbered(category_ids)
    images = [{"id": number} for number in image_numbers.values()]
    categories = [{"id": number} for number in category_numbers.values()]

    def coco(objects: Iterable[dict[str, Any]]) -> Any:
        built = coco_class()
        numbered = [
            {
                **item,
                "id": number,
                "image_id": image_numbers[item["image_id"]],
                "category_id": category_numbers[item["category_id"]],
            }
            for number, item in enumerate(objects, start=1)
        ]
        built.dataset = {"images": images, "categories": categories, "annotations": numbered}
        built.createIndex()
        return built

    detections = [{**result, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0} for result in results]
    # Both engines report their progress, on stdout or in a log; stdout belongs to the commands.
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = evaluator_class(coco(_coco_objects(annotations, category_numbers)), coco(detections), "bbox")
        evaluator.params.imgIds = [image_numbers[image_id] for image_id in image_ids]
        evaluator.params.catIds = list(category_numbers.values())
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats, evaluator.eval["precision"][:, :, :, 0, -1]


def _numbered(ids: Iterable[int]) -> dict[int, int]:
    """From each id to its position, from 1, in ascending order."""
    return {key: number for number, key in enumerate(sorted(ids), start=1)}


def _coco_objects(annotations: CocoAnnotations, known: Collection[int]) -> Iterator[dict[str, Any]]:
    """The objects of ``known`` categories in COCO's format, crowds and those that training ignores included."""
    columns = (
        annotations.image_ids[annotations.image_rows],
        np.array(annotations.category_ids, dtype=np.int64)[annotations.labels - 1],
        annotations.xywh,
        annotations.areas,
        annotations.crowds.astype(np.int64),
    )
    names = ("image_id", "category_id", "bbox", "area", "iscrowd")
    for row in zip(*(column.tolist() for column in columns)):
        if row[1] in known:
            yield dict(zip(names, row))
