"""The training step and the optimizer of a detector, for Lightning."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpm_rcnn.evaluation.module import Batch, EvaluationModule
from cpm_rcnn.inference.detector import Detector, size_arguments
from cpm_rcnn.models.build import build
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.training.optimizer import build_optimizer
from cpm_rcnn.training.schedule import Schedule
from cpm_rcnn.weights.checkpoints import FORMAT, OPERATING_POINTS, check_format, stored_operating_points


class DetectionModule(EvaluationModule):
    """A detector with its training step and optimizer.

    Its arguments are plain values and are stored in every checkpoint, so ``DetectionModule.load_from_checkpoint(PATH)``
    works as for any LightningModule. The constructor reads no file: starting weights are loaded afterwards by
    :func:`cpm_rcnn.weights.initialize.initialize`.

    Args:
        model: options of :func:`~cpm_rcnn.models.build.build_detector` except ``num_classes``.
        categories: the classes 1..C, each a mapping with ``id`` and ``name``.
        schedule: fields of :class:`~cpm_rcnn.training.schedule.Schedule`.
        data: settings of the data that the model is evaluated on, as in
            :attr:`CocoDataModule.evaluation_arguments <cpm_rcnn.data.CocoDataModule.evaluation_arguments>`.
        format: the checkpoint format of these arguments.
        recipe: what else decided the weights, by name (:func:`cpm_rcnn.cli.recipe.training_recipe`); only recorded, so
            that a run that resumes can be compared with it.

    Attributes:
        losses: the losses of the last training step by name, () float32 each, without gradient.
        schedule_counts: whether a run that resumes takes learning rates and other settings of the optimizer from its
            schedule, in place of those that the checkpoint has restored.

    Raises:
        ArgumentError: a value of ``model`` or ``schedule`` is invalid.
        UserError: ``format`` is another checkpoint format.
    """

    losses: dict[str, Tensor]

    def __init__(
        self,
        model: Mapping[str, Any],
        categories: Sequence[Mapping[str, Any]],
        schedule: Mapping[str, Any],
        data: Mapping[str, Any],
        format: int | None = FORMAT,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        check_format(format, "checkpoint")
        settings = ModelSettings.from_options(**model)
        super().__init__(Detector(build(settings, len(categories)), categories, **size_arguments(data)))
        # With all defaults filled in, so that a checkpoint does not depend on the defaults of a later version.
        self.schedule = Schedule.from_dict(schedule, "schedule")
        self.schedule_counts = False
        model, schedule = settings.to_options(), self.schedule.to_dict()
        self.save_hyperparameters(
            {
                "model": model,
                "categories": [dict(category) for category in categories],
                "schedule": schedule,
                "data": dict(data),
                "format": FORMAT,
                "recipe": None if recipe is None else dict(recipe),
            }
        )

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.model.check_trainable()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_format(checkpoint.get("hyper_parameters", {}).get("format"), "checkpoint")
        self.detector.operating_points = stored_operating_points(checkpoint, "checkpoint")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Only those of the weights that are saved: there are none between an optimizer step and the next validation.
        if self.detector.operating_points is not None:
            checkpoint[OPERATING_POINTS] = self.detector.operating_points

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.detector.operating_points = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(images, targets)
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(images))
        self.log_dict({f"train/{name}": loss for name, loss in self.losses.items()}, batch_size=len(images))
        return total

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # The last step of a run is validated and saved even if it is not a multiple of the validation interval.
        # With a number of epochs instead, ``max_steps`` is -1.
        if 0 <= self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        if self.schedule_counts:
            self._apply_schedule()

    def configure_optimizers(self) -> Any:
        world = self.trainer.world_size * self.trainer.accumulate_grad_batches
        # With loaders instead of a data module, the batch size is the schedule's.
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        images_per_step = getattr(datamodule, "batch_size", self.schedule.images_per_device) * world
        optimizer = build_optimizer(self.schedule, self.model, images_per_step)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _apply_schedule(self) -> None:
        """Replace the settings of the optimizer, which a checkpoint has restored, by those of the schedule."""
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        own = self.configure_optimizers()
        scheduler.base_lrs = own["lr_scheduler"]["scheduler"].base_lrs
        factor = self.schedule.rate_factor(scheduler.last_epoch)
        for group, new, base_lr in zip(optimizer.param_groups, own["optimizer"].param_groups, scheduler.base_lrs):
            group.update({name: value for name, value in new.items() if name != "params"}, lr=base_lr * factor)
