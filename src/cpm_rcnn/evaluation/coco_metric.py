"""COCO's twelve metrics, gathered over all processes."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cpm_rcnn.boxes import CONTINUOUS, BoxConvention
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.validation import check_categories
from cpm_rcnn.errors import UserError
from cpm_rcnn.evaluation.analysis.split import EvaluatedSplit
from cpm_rcnn.evaluation.engines import METRIC_NAMES, EvaluationData, mean_of_defined, precision_and_recall, summarize
from cpm_rcnn.evaluation.found import FoundDetections
from cpm_rcnn.evaluation.operating_points import operating_points
from cpm_rcnn.inference.image_detections import RESULT_KEYS
from cpm_rcnn.models.structures import DETAILS


class CocoMetric(Metric):
    """Average precision and recall exactly as pycocotools computes them, to the last bit.

    Crowds and areas (those of masks, if the file has masks) count as COCO defines, and objects that training ignores
    count too. Only images passed to :meth:`update` are evaluated. If an image was passed more than once, for
    example because a distributed sampler repeats images to fill the last batch, only the first occurrence counts, in
    the order of the ranks.

    The values of the file's ids do not change the metrics: what computes them gets numbers from 1 instead
    (``evaluation/engines.py``).

    Call ``update`` for each batch and ``compute`` at the end, in all processes: ``compute`` gathers the detections of
    all processes. One process computes the metrics and sends them to the others, so that the return value of
    ``compute``, and that of ``results`` afterwards, is complete in each. Log the numbers instead of the metric object,
    because a nested dict cannot be logged, and then call ``reset``.

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
        details: whether the columns of :data:`~cpm_rcnn.models.structures.DETAILS` are kept.

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
        self._categories = [{"id": int(category["id"]), "name": category["name"]} for category in categories]
        occurrences = Counter(category["name"] for category in categories)
        self.category_names = [
            category["name"] if occurrences[category["name"]] == 1 else f"{category['name']} ({category['id']})"
            for category in categories
        ]
        # Categories that the model knows and the file does not list are not reported.
        listed = dict(zip(annotations.category_ids, annotations.listed.tolist()))
        self._reported = [listed.get(key, True) for key in self.category_ids]
        self._known_ids = set(annotations.image_ids.tolist())
        self._found: FoundDetections | None = None
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
            for state, number in ((self.image_ids, image_id), (self.counts, len(found["scores"]))):
                # Unlike a tensor of a list, it is not copied from the host, which would wait for the device.
                state.append(torch.full((1,), number, dtype=torch.int64, device=self.device))
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
        self._found = self._gathered()
        if not self.annotations.has_annotations:
            stats, per_class = [math.nan] * len(METRIC_NAMES), [math.nan] * sum(self._reported)
        else:
            stats, per_class = self._on_one_process(self._found)
        names = compress(self.category_names, self._reported)
        return {**dict(zip(METRIC_NAMES, stats, strict=True)), "per_class": dict(zip(names, per_class, strict=True))}

    def results(self, details: bool = False) -> list[dict[str, Any]]:
        """The detections from which the last metrics were computed, in COCO's results format.

        Args:
            details: whether to add ``class_score``, ``predicted_iou`` and ``rsm_probability``, if the head has them and
                the metric keeps details.

        Returns:
            Dicts of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels) and ``score``, from all
            processes and without duplicate images; not rounded, so that pycocotools computes the same metrics.

        Raises:
            RuntimeError: :meth:`compute`, which gathers them, was not called before.
        """
        if self._found is None:
            raise RuntimeError("call CocoMetric.compute() before results()")
        _, *columns, columns_of_details = self._found
        names = ("image_id", "category_id", "bbox", "score")
        rows = [dict(zip(names, row)) for row in zip(*(column.tolist() for column in columns))]
        if details and columns_of_details is not None:
            for row, values in zip(rows, columns_of_details.tolist(), strict=True):
                row |= {key: value for key, value in zip(RESULT_KEYS.values(), values) if not math.isnan(value)}
        return rows

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
        if self._found is None:
            raise RuntimeError("call CocoMetric.compute() before operating_points()")
        if not self.annotations.has_annotations:
            return None
        categories = dict(compress(zip(self.category_names, self.category_ids), self._reported))
        return operating_points(self.annotations, self._found, categories, precision)

    def evaluated_split(self) -> EvaluatedSplit | None:
        """The objects and detections from which the last metrics were computed, for an analysis.

        Needs no other process.

        Returns:
            None without annotations.

        Raises:
            RuntimeError: :meth:`compute` was not called before.
        """
        if self._found is None:
            raise RuntimeError("call CocoMetric.compute() before evaluated_split()")
        annotations = self.annotations
        if not annotations.has_annotations:
            return None
        pairs = sorted(compress(zip(self.category_ids, self.category_names), self._reported))
        class_ids, class_names = [key for key, _ in pairs], [name for _, name in pairs]
        by_id = np.argsort(annotations.image_ids, kind="stable")
        rows = by_id[np.searchsorted(annotations.image_ids, self._found.evaluated, sorter=by_id)]
        return EvaluatedSplit(
            data=evaluation_data(annotations, self._found, np.array(class_ids, dtype=np.int64)),
            image_ids=self._found.evaluated,
            file_names=annotations.file_names[rows],
            sizes=np.stack([annotations.widths[rows], annotations.heights[rows]], axis=1),
            class_ids=class_ids,
            class_names=class_names,
            details=self._found.details,
        )

    def evaluated_images(self) -> np.ndarray:
        """(I,) int64, the ids of the images of the last metrics in ascending order.

        Raises:
            RuntimeError: :meth:`compute` was not called before.
        """
        if self._found is None:
            raise RuntimeError("call CocoMetric.compute() before evaluated_images()")
        return self._found.evaluated

    def evaluated_categories(self) -> list[dict[str, Any]]:
        """``id`` and ``name`` of the categories of the metrics, in the order of the labels."""
        return list(compress(self._categories, self._reported))

    def _gathered(self) -> FoundDetections:
        """The detections of the states, which hold those of all processes in ``compute``."""
        image_ids, counts, labels, scores = (
            dim_zero_cat(state).cpu().numpy() for state in (self.image_ids, self.counts, self.labels, self.scores)
        )
        boxes = self.convention.to_xywh(dim_zero_cat(self.boxes).cpu().double()).numpy()
        assert ((labels >= 1) & (labels <= len(self.category_ids))).all(), "labels must be in 1..C"
        evaluated, first = np.unique(image_ids, return_index=True)
        counted = np.zeros(len(image_ids), dtype=bool)
        counted[first] = True
        kept = np.repeat(counted, counts) & np.array(self._reported, dtype=bool)[labels - 1]
        return FoundDetections(
            evaluated,
            np.repeat(image_ids, counts)[kept],
            np.array(self.category_ids, dtype=np.int64)[labels[kept] - 1],
            boxes[kept],
            scores[kept].astype(np.float64),
            dim_zero_cat(self.details).cpu().double().numpy()[kept] if self._keeps_details else None,
        )

    def _on_one_process(self, found: FoundDetections) -> tuple[list[float], list[float]]:
        """:meth:`_metrics` of the first process, in all processes that the states were gathered from.

        Raises:
            RuntimeError: it failed in the first process, where the original error is raised.
        """
        group = self.process_group
        if not self._is_synced or dist.get_world_size(group) == 1:
            return self._metrics(found)
        first = dist.get_global_rank(group, 0) if group is not None else 0
        if dist.get_rank() != first:
            received: list[Any] = [None]
            dist.broadcast_object_list(received, src=first, group=group)
            if isinstance(received[0], str):
                raise RuntimeError(f"the evaluation failed in process {first}: {received[0]}")
            return received[0]
        try:
            metrics = self._metrics(found)
        except Exception as error:
            dist.broadcast_object_list([f"{type(error).__name__}: {error}"], src=first, group=group)
            raise
        dist.broadcast_object_list([metrics], src=first, group=group)
        return metrics

    def _metrics(self, found: FoundDetections) -> tuple[list[float], list[float]]:
        """The twelve metrics, and the AP of each reported category."""
        category_ids = np.array(list(compress(self.category_ids, self._reported)), dtype=np.int64)
        precision, recall = precision_and_recall(evaluation_data(self.annotations, found, np.sort(category_ids)))
        columns = np.argsort(np.argsort(category_ids))
        return summarize(precision, recall), [mean_of_defined(precision[:, :, k, 0, 2]) for k in columns]


def evaluation_data(annotations: CocoAnnotations, found: FoundDetections, category_ids: np.ndarray) -> EvaluationData:
    """The detections, and the objects of the evaluated images, crowds and those that training ignores included.

    Args:
        annotations: the ground truth.
        found: the detections.
        category_ids: (K,) int64, the categories to evaluate, in ascending order.
    """
    image_ids = annotations.image_ids[annotations.image_rows]
    object_categories = np.array(annotations.category_ids, dtype=np.int64)[annotations.labels - 1]
    evaluated = np.isin(image_ids, found.evaluated) & np.isin(object_categories, category_ids)
    return EvaluationData(
        images=len(found.evaluated),
        categories=len(category_ids),
        object_images=np.searchsorted(found.evaluated, image_ids[evaluated]) + 1,
        object_categories=np.searchsorted(category_ids, object_categories[evaluated]) + 1,
        object_boxes=annotations.xywh[evaluated],
        object_areas=annotations.areas[evaluated],
        object_crowds=annotations.crowds[evaluated],
        found_images=np.searchsorted(found.evaluated, found.image_ids) + 1,
        found_categories=np.searchsorted(category_ids, found.category_ids) + 1,
        found_boxes=found.boxes,
        found_scores=found.scores,
    )
