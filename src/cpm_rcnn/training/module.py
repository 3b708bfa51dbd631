"""The training step, the evaluation and the optimizer of a detector, for Lightning."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from cpm_rcnn.boxes import CONVENTIONS
from cpm_rcnn.evaluation.coco_metric import METRIC_NAMES, CocoMetric
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.detector import CPMRCNN
from cpm_rcnn.training.schedule import Schedule

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DetectionModule(pl.LightningModule):
    """CPM R-CNN under Lightning.

    Its hyperparameters, stored in every checkpoint, are plain values and enough to build it again.

    Args:
        model: arguments of :func:`~cpm_rcnn.models.build.build_detector` but ``num_classes``.
        categories: what labels 1..C mean: a mapping with ``id`` and ``name`` each.
        schedule: arguments of :class:`~cpm_rcnn.training.schedule.Schedule`.
        data: what evaluates it: :attr:`CocoDataModule.evaluation_arguments`.

    Attributes:
        metric: of the current evaluation; its ``results()`` are the detections after it.
        figures: of the last finished evaluation, as :meth:`CocoMetric.compute` returns them.
        losses: of the last training step, by name, () float32 each, without gradient.
    """

    detector: CPMRCNN
    metric: CocoMetric
    figures: dict[str, Any]
    losses: dict[str, Tensor]

    def __init__(
        self,
        model: Mapping[str, Any],
        categories: Sequence[Mapping[str, Any]],
        schedule: Mapping[str, Any],
        data: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.schedule = Schedule(**schedule)
        self.detector = build_detector(**model, num_classes=len(categories))
        self.metrics = {}

    @property
    def class_names(self) -> list[str]:
        """Names of labels 1..C."""
        return [category["name"] for category in self.hparams["categories"]]

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detections on uint8 RGB ``images`` (3, H, W), see :class:`CPMRCNN`."""
        return self.detector(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.detector(images, targets)
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(images))
        self.log_dict({f"train/{name}": loss for name, loss in self.losses.items()}, batch_size=len(images))
        return total

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # The run's last step is evaluated and saved, also where it is no multiple of the validation interval.
        if self.trainer.global_step >= self.trainer.max_steps:
            self.trainer.should_stop = True

    def on_validation_start(self) -> None:
        self.metric = self._new_metric("val")

    def on_test_start(self) -> None:
        self.metric = self._new_metric("test")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def configure_optimizers(self) -> Any:
        world = self.trainer.world_size * self.trainer.accumulate_grad_batches
        images_per_step = self.trainer.datamodule.batch_size * world  # type: ignore[attr-defined]
        optimizer = self.schedule.optimizer_for(self.detector, images_per_step)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _new_metric(self, split: str) -> CocoMetric:
        categories = self.hparams["categories"]
        annotations = self.trainer.datamodule.annotations(split)  # type: ignore[attr-defined]
        return CocoMetric(
            annotations.path,
            [category["id"] for category in categories],
            self.class_names,
            CONVENTIONS[self.hparams["model"].get("pixels", "continuous")],
            annotations.skipped_images,
            annotations.skipped_objects,
        ).to(self.device)

    def _evaluate(self, batch: Batch) -> None:
        images, targets = batch
        detections = self.detector(images)
        originals = [
            detection | {"boxes": to_original(detection["boxes"], image.shape[-2:], target["original_size"])}
            if target["readable"]
            else {name: value[:0] for name, value in detection.items()}
            for detection, image, target in zip(detections, images, targets)
        ]
        self.metric.update([target["image_id"] for target in targets], originals)

    def _finish(self, split: str) -> None:
        self.metrics = self.metric.compute()
        # Every process holds the same figures already, gathered by the metric; sync_dist only tells Lightning so.
        self.log_dict({f"{split}/{name}": self.metrics[name] for name in METRIC_NAMES if name != "AP"}, sync_dist=True)
        self.log(f"{split}/AP", self.metrics["AP"], prog_bar=True, sync_dist=True)


def to_original(boxes: Tensor, size: Sequence[int], original_size: Sequence[int]) -> Tensor:
    """Boxes (N, 4) of an image at network ``size`` (h, w), in pixels of its ``original_size`` (h, w)."""
    y, x = (original / side for original, side in zip(original_size, size))
    return boxes * boxes.new_tensor([x, y, x, y])
