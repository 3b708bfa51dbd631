"""Evaluation of a detector under Lightning."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torchmetrics import Metric

from cpm_rcnn.data import CocoAnnotations
from cpm_rcnn.evaluation.coco_metric import CocoMetric
from cpm_rcnn.inference.detector import Detector
from cpm_rcnn.models.finite import check_weights

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class EvaluationModule(pl.LightningModule):
    """Runs a detector over the validation or test split of a :class:`~cpm_rcnn.data.CocoDataModule`.

    To use another metric, override :meth:`configure_metrics`.

    Args:
        detector: what to evaluate.

    Attributes:
        model: the detector's ``nn.Module``.
        metric: the metric of the current or last evaluation.
        metrics: what it computed at the end of the last evaluation.
    """

    metric: Metric
    metrics: dict[str, Any]

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.model = detector.model
        self.detector = detector
        self.metrics = {}

    def configure_metrics(self, annotations: CocoAnnotations) -> Metric:
        """The metric for a split.

        Args:
            annotations: of the split.

        Returns:
            A torchmetrics ``Metric`` with ``update(image_ids, detections)`` and ``compute()``, as
            :class:`~cpm_rcnn.evaluation.coco_metric.CocoMetric` has them. Every float that ``compute`` returns is
            logged as ``val/NAME`` or ``test/NAME``; the best checkpoint of a training is chosen by ``val/AP``.
        """
        return CocoMetric(annotations, self.detector.categories, self.detector.convention)

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

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _start(self, split: str) -> None:
        check_weights(self.model.state_dict(), "the model")
        annotations = self.trainer.datamodule.annotations(split)  # type: ignore[attr-defined]
        metric = self.configure_metrics(annotations).to(self.device)
        # Not as a submodule: a metric's persistent states and weights do not belong in a model's checkpoint.
        object.__setattr__(self, "metric", metric)

    def _evaluate(self, batch: Batch) -> None:
        images, targets = batch
        found = self.detector.detect_resized(images, [target["original_size"] for target in targets])
        # An image that could not be read was replaced by a black one, on which nothing counts as found.
        found = [
            detections if target["readable"] else {name: value[:0] for name, value in detections.items()}
            for detections, target in zip(found, targets)
        ]
        self.metric.update([target["image_id"] for target in targets], found)

    def _finish(self, split: str) -> None:
        self.metrics = self.metric.compute()
        for name, value in self.metrics.items():
            if isinstance(value, float):
                # Every process holds the same value, gathered by the metric; sync_dist only tells Lightning so.
                self.log(f"{split}/{name}", value, prog_bar=name == "AP", sync_dist=True)
