"""COCO's twelve figures, gathered over all processes."""

import contextlib
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cpm_rcnn.boxes import CONTINUOUS, BoxConvention
from cpm_rcnn.errors import UserError

# In the order of pycocotools' ``COCOeval.stats``.
METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class CocoMetric(Metric):
    """Average precision and recall exactly as pycocotools computes them.

    The truth is read from the annotation file itself, so that crowds and areas (of masks, where the file has
    them) count as COCO defines; only the images that were seen are evaluated. An image seen twice, as when a
    distributed sampler pads its last batch, counts once: the first of its batches stays, in order of rank.

    Call :meth:`update` per batch and :meth:`compute` at the end, on every process alike: ``compute`` gathers
    what all of them saw, so that its figures, and :meth:`results` after it, are whole on each. Log its
    numbers, not the metric object (a nested dict cannot be logged), then call ``reset``.
    """

    full_state_update = False

    # List states, concatenated over processes; ``counts`` says how many detections belong to each image.
    image_ids: list[Tensor]
    counts: list[Tensor]
    boxes: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        annotation_file: str | PathLike[str],
        category_ids: Sequence[int],
        category_names: Sequence[str],
        convention: BoxConvention = CONTINUOUS,
        skipped_images: Collection[int] = (),
        skipped_objects: Collection[int] = (),
    ) -> None:
        """Read the truth.

        Args:
            annotation_file: a COCO ``instances`` JSON file; one without ``annotations`` (COCO's test-dev)
                gives results but no figures. An annotation without ``area`` has that of its box, one without
                ``iscrowd`` is no crowd, one without ``id`` has its place in the file.
            category_ids: the file's category id of each label: label l means ``category_ids[l - 1]``.
            category_names: their names, in the same order. A name that occurs twice is told apart by its id.
            convention: the meaning of the detections' x2 and y2.
            skipped_images: places in the file's list of those that do not count.
            skipped_objects: places in its list of annotations of those that do not count.

        Raises:
            UserError: the file cannot be read or is not in COCO's format.
        """
        super().__init__()
        self.annotation_file = Path(annotation_file)
        self.category_ids = list(category_ids)
        times = Counter(category_names)
        self.category_names = [
            name if times[name] == 1 else f"{name} ({category_id})"
            for name, category_id in zip(category_names, category_ids, strict=True)
        ]
        self.convention = convention
        self._truth = _read_truth(self.annotation_file, skipped_images, skipped_objects)
        self._known_ids = {image["id"] for image in self._truth["images"]}
        self._results: list[dict[str, Any]] | None = None
        for state in ("image_ids", "counts", "boxes", "scores", "labels"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, image_ids: Sequence[int], detections: Sequence[dict[str, Tensor]]) -> None:
        """Add a batch.

        Args:
            image_ids: the COCO id of each image.
            detections: one dict per image, in pixels of the *original* image: ``boxes`` (N, 4) xyxy,
                ``scores`` (N,), ``labels`` (N,) in 1..C; N may be 0.

        Raises:
            UserError: an image id is not in the annotation file.
        """
        for image_id, found in zip(image_ids, detections, strict=True):
            if image_id not in self._known_ids:
                raise UserError(f"{self.annotation_file}: has no image with id {image_id}")
            self.image_ids.append(torch.tensor([image_id], device=self.device))
            self.counts.append(torch.tensor([len(found["scores"])], device=self.device))
            self.boxes.append(found["boxes"].detach().to(self.device, torch.float32).reshape(-1, 4))
            self.scores.append(found["scores"].detach().to(self.device, torch.float32))
            self.labels.append(found["labels"].detach().to(self.device, torch.int64))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states over all processes (see ``torchmetrics.Metric.sync``).

        A process without any image brings empty tensors of the right shape and type; without them the
        gathering would fail or wait for ever.
        """
        if not self._is_synced and not self.image_ids:
            for state in (self.image_ids, self.counts, self.labels):
                state.append(torch.zeros(0, dtype=torch.int64, device=self.device))
            self.boxes.append(torch.zeros(0, 4, device=self.device))
            self.scores.append(torch.zeros(0, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Any]:
        """The figures over all processes, from 0 to 1.

        Returns:
            The floats ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``AR1``, ``AR10``, ``AR100``,
            ``ARs``, ``ARm``, ``ARl``, and ``per_class``, a dict from category name to its AP. A figure
            without any object to find is -1, as in pycocotools; if the file has no ``annotations``, all are
            NaN.
        """
        image_ids, self._results = self._gathered()
        if self._truth["annotations"] is None:
            return _figures([math.nan] * len(METRIC_NAMES), dict.fromkeys(self.category_names, math.nan))
        stats, precision = _evaluate(self._truth, self._results, image_ids, self.category_ids)
        # The engine sorts the categories by id: (thresholds, recalls, categories), all areas, 100 detections.
        by_id = {category_id: precision[:, :, k] for k, category_id in enumerate(sorted(self.category_ids))}
        per_class = {
            name: _mean_of_defined(by_id[category_id])
            for name, category_id in zip(self.category_names, self.category_ids, strict=True)
        }
        return _figures(stats.tolist(), per_class)

    def results(self) -> list[dict[str, Any]]:
        """The detections behind the last figures, in COCO's results format.

        Returns:
            Dicts of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels) and ``score``,
            over all processes and without the duplicate images; unrounded, so that pycocotools gives the
            same figures.

        Raises:
            RuntimeError: :meth:`compute`, which gathers them, was not called before.
        """
        if self._results is None:
            raise RuntimeError("CocoMetric.results() needs a call of compute() before it")
        return self._results

    def _gathered(self) -> tuple[list[int], list[dict[str, Any]]]:
        """The ids of the images seen, each once, and their detections in COCO's results format."""
        image_ids: list[int] = dim_zero_cat(self.image_ids).tolist()
        counts = dim_zero_cat(self.counts).tolist()
        boxes = self.convention.to_xywh(dim_zero_cat(self.boxes).cpu().double()).tolist()
        scores = dim_zero_cat(self.scores).tolist()
        labels = dim_zero_cat(self.labels).tolist()
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
                    }
                    for label, bbox, score in zip(labels[start:end], boxes[start:end], scores[start:end])
                ]
            start = end
        return list(seen), results


def _figures(stats: Sequence[float], per_class: dict[str, float]) -> dict[str, Any]:
    return {
        **dict(zip(METRIC_NAMES, stats, strict=True)),
        "per_class": per_class,
    }


def _mean_of_defined(precision: np.ndarray) -> float:
    """The mean of the entries above -1, which marks "no object to find"; -1 where there is none."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else -1.0


def _read_truth(path: Path, skipped_images: Collection[int], skipped_objects: Collection[int]) -> dict[str, Any]:
    """The parts of an annotation file that count here; ``annotations`` is None where the file has none.

    Masks are left behind: they are most of a file's memory, and their areas stay.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    try:
        truth = {
            "images": [
                {"id": image["id"]} for place, image in enumerate(content["images"]) if place not in skipped_images
            ],
            "annotations": None,
        }
        if "annotations" in content:
            truth["annotations"] = [
                {
                    "id": annotation.get("id", number),
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"],
                    "bbox": annotation["bbox"],
                    "area": annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]),
                    "iscrowd": annotation.get("iscrowd", 0),
                }
                for number, annotation in enumerate(content["annotations"], start=1)
                if number - 1 not in skipped_objects
            ]
    except KeyError as error:
        raise UserError(f"{path}: is not a COCO annotation file: an entry lacks {error}") from error
    except (TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: is not a COCO annotation file: {error}") from error
    return truth


def _engine() -> tuple[type, type]:
    """The classes COCO and COCOeval: faster-coco-eval's where it is installed, else pycocotools'."""
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
    truth: dict[str, Any], results: list[dict[str, Any]], image_ids: list[int], category_ids: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The twelve figures, and the precision (10 thresholds, 101 recalls, categories by id), in float64."""
    coco_class, evaluator_class = _engine()

    def coco(annotations: list[dict[str, Any]]) -> Any:
        built = coco_class()
        built.dataset = {
            "images": truth["images"],
            "categories": [{"id": category_id} for category_id in category_ids],
            "annotations": annotations,
        }
        built.createIndex()
        return built

    found = [
        {**result, "id": k, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for k, result in enumerate(results, start=1)
    ]
    # Both engines tell of their progress, on stdout or in a log, where commands print their own answer.
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = evaluator_class(coco(truth["annotations"]), coco(found), "bbox")
        evaluator.params.imgIds = image_ids
        evaluator.params.catIds = category_ids
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats, evaluator.eval["precision"][:, :, :, 0, -1]
