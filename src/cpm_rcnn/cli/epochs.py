"""The number of steps of a training whose length is given in epochs."""

import math
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.cli.lightning import process_count
from cpm_rcnn.cli.nodes import schedule_settings
from cpm_rcnn.data import CocoDataModule

# With ``epochs=auto``, a run trains on about this many images, in a number of epochs between these limits.
_AUTO_IMAGES, _AUTO_EPOCHS = 6000, (12, 100)
# At most so many validations.
_VALIDATIONS = 20


class Lengths(NamedTuple):
    """Lengths in optimizer steps."""

    max_steps: int
    milestones: list[int]
    warmup_steps: int
    val_interval: int


def auto_epochs(images: int) -> float:
    """The number of epochs of ``epochs=auto``: fewer with more images, so that small data sets train long enough."""
    low, high = _AUTO_EPOCHS
    return min(max(_AUTO_IMAGES / images, low), high)


def lengths(
    epochs: float, images: int, images_per_step: int, max_steps: int, milestones: list[int], warmup_steps: int
) -> Lengths:
    """A schedule of ``epochs`` in place of one of ``max_steps``.

    Milestones keep their part of the run. The warm-up becomes no longer than a tenth of it. There is a validation after
    each epoch, but at most 20 of them.

    Args:
        epochs: passes over the training images.
        images: number of training images, or of their tiles.
        images_per_step: images of a step on all devices.
        max_steps: number of steps of the other schedule.
        milestones: its milestones.
        warmup_steps: its warm-up.
    """
    steps = max(1, math.ceil(epochs * images / images_per_step))
    scaled = [round(milestone * steps / max_steps) for milestone in milestones]
    validations = min(max(1, round(epochs)), _VALIDATIONS)
    return Lengths(steps, scaled, min(warmup_steps, steps // 10), math.ceil(steps / validations))


def resolve_epochs(config: DictConfig, datamodule: CocoDataModule) -> DictConfig:
    """The config with the lengths that ``schedule.epochs`` means, which are printed; itself if that is null.

    The data module learns the number of steps.

    Raises:
        UserError: the training images cannot be counted, because their annotations are missing or invalid.
    """
    schedule = schedule_settings(config)
    if schedule.epochs is None:
        return config
    images, accumulated = datamodule.num_training_images, config.trainer.accumulate_grad_batches
    epochs = auto_epochs(images) if isinstance(schedule.epochs, str) else schedule.epochs
    per_step = schedule.images_per_device * accumulated * process_count(config)
    new = lengths(epochs, images, per_step, schedule.max_steps, list(schedule.milestones), schedule.warmup_steps)
    units = "images" if datamodule.settings.tile is None else "tiles"
    print(
        f"schedule.epochs={schedule.epochs}: {epochs:.3g} epochs of {images} {units} are {new.max_steps} steps of "
        f"{per_step}; milestones {new.milestones}, warm-up {new.warmup_steps}, a validation every {new.val_interval}"
    )
    datamodule.max_steps = new.max_steps * accumulated
    return OmegaConf.merge(config, {"schedule": new._asdict()})  # type: ignore[return-value]
