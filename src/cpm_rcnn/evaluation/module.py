"""Evaluation of a detector under Lightning."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torchmetrics import Metric

from cpm_rcnn.data import CocoAnnotations, CocoDataset
from cpm_rcnn.errors import UserError
from cpm_rcnn.evaluation.coco_metric import CocoMetric
from cpm_rcnn.inference.detector import Detector
from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.models.finite import check_weights

OPERATING_PRECISION = 0.9
Batch = tuple[list[Tensor], list[dict[str, Any]]]


class EvaluationModule(pl.LightningModule):
    """Runs a detector over the validation or test split of a :class:`~cpm_rcnn.data.CocoDataModule`.

    Without a data module, the loader's dataset must be a :class:`~cpm_rcnn.data.CocoDataset`, which knows its
    annotations, with :func:`~cpm_rcnn.data.samplers.collate` as ``collate_fn``. ``Trainer.predict`` returns one list of
    detections per batch.

    To use another metric, override :meth:`configure_metrics`.

    Args:
        detector: the detector to evaluate.
        details: whether the metric also gets how scores were computed
            (:meth:`Detector.detect <cpm_rcnn.inference.Detector.detect>`), which the report shows.
        operating_precision: the precision of the second operating point of each class, 0 to 1; None for no such point.

    Attributes:
        model: the detector's ``nn.Module``.
        metric: the metric of the current or last evaluation.
        metrics: what it computed at the end of the last evaluation.
        evaluated_step: the training step of that evaluation; None before the first one.
        operating_points: score thresholds per class of the last evaluation
            (:func:`~cpm_rcnn.evaluation.operating_points.operating_points`), in the first process only; None before it,
            without annotations, and if the metric has no method ``operating_points``. A validation also sets those of
            the detector.
    """

    metric: Metric
    metrics: dict[str, Any]

    def __init__(
        self, detector: Detector, details: bool = True, operating_precision: float | None = OPERATING_PRECISION
    ) -> None:
        super().__init__()
        self.operating_precision = operating_precision
        self.operating_points: dict[str, Any] | None = None
        self.details = details
        self.model = detector.model
        self.detector = detector
        self.metrics = {}
        self.evaluated_step: int | None = None

    def configure_metrics(self, annotations: CocoAnnotations) -> Metric:
        """The metric for a split.

        Args:
            annotations: annotations of the split.

        Returns:
            A torchmetrics ``Metric`` with ``update(image_ids, detections)`` and ``compute()``, as
            :class:`~cpm_rcnn.evaluation.coco_metric.CocoMetric` has them. Every float that ``compute`` returns is
            logged as ``val/NAME`` or ``test/NAME``; the best checkpoint of a training run is chosen by ``val/AP``. Its
            method ``operating_points(precision)`` is optional, and is called in the first process after ``compute``.
        """
        return CocoMetric(annotations, self.detector.categories, self.detector.convention, self.details)

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return self.model(images)

    def on_validation_start(self) -> None:
        self._start("val")

    def on_test_start(self) -> None:
        self._start("test")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        """Detections in pixels of the original images, one dict per image: ``boxes``, ``scores``, ``labels``."""
        return self._detect(batch, details=False)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _start(self, split: str) -> None:
        check_weights(self.model.state_dict(), "the model")
        metric = self.configure_metrics(self._annotations(split)).to(self.device)
        # Not as a submodule: a metric's persistent states and weights do not belong in a model's checkpoint.
        object.__setattr__(self, "metric", metric)

    def _annotations(self, split: str) -> CocoAnnotations:
        """The annotations of a split: the data module's, or those of the loader's dataset.

        Raises:
            UserError: neither has annotations.
        """
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(datamodule, "annotations"):
            return datamodule.annotations(split)
        loaders = self.trainer.val_dataloaders if split == "val" else self.trainer.test_dataloaders
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        datasets = [getattr(loader, "dataset", None) for loader in loaders]
        if len(datasets) == 1 and isinstance(datasets[0], CocoDataset):
            return datasets[0].annotations
        kinds = ", ".join(type(dataset).__name__ for dataset in datasets)
        raise UserError(
            f"{split} loader over {kinds}: an evaluation needs a CocoDataModule, or one loader over a CocoDataset, "
            "which has the annotations"
        )

    def _evaluate(self, batch: Batch) -> None:
        self.metric.update([target["image_id"] for target in batch[1]], self._detect(batch, self.details))

    def _detect(self, batch: Batch, details: bool) -> list[dict[str, Tensor]]:
        images, targets = batch
        sizes = [target["original_size"] for target in targets]
        found = self.detector.detect_resized(images, sizes, details=details)
        # An image that could not be read was replaced by a black one, on which nothing counts as found.
        return [
            detections if target["readable"] else {name: value[:0] for name, value in detections.items()}
            for detections, target in zip(found, targets)
        ]

    def _finish(self, split: str) -> None:
        if isinstance(self.model, TwoStageDetector):
            self.model.check_outputs()
        self.metrics = self.metric.compute()
        self.evaluated_step = self.trainer.global_step
        self._find_operating_points(split)
        for name, value in self.metrics.items():
            if isinstance(value, float):
                # Every process holds the same value, gathered by the metric; sync_dist only tells Lightning so.
                self.log(f"{split}/{name}", value, prog_bar=name == "AP", sync_dist=True)

    def _find_operating_points(self, split: str) -> None:
        compute = getattr(self.metric, "operating_points", None)
        # One process does it: the metric has gathered the detections of all. Lightning's check before a training runs
        # on a few images only.
        first = self.trainer.is_global_zero and not self.trainer.sanity_checking
        self.operating_points = compute(self.operating_precision) if compute is not None and first else None
        if split == "val":
            self.detector.operating_points = self.operating_points
