"""What decides the weights that a run ends with, as a resume compares it."""

from typing import Any

from omegaconf import DictConfig

from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.training.module import DetectionModule

# Options with the role inference that decide which images are used in training, in which tiles, with which labels.
_DATA = ("classes", "val_fraction", "split_seed", "tile", "tile_overlap")
# Options that may change in a run that resumes: how long it is, where things are, and how they are evaluated.
_MAY_CHANGE = {
    *("schedule.epochs", "schedule.max_steps", "schedule.milestones", "schedule.val_interval"),
    "data.val_count",
    *("backbone.weights", "backbone.check_weights"),
}


def training_recipe(
    config: DictConfig, module: DetectionModule, datamodule: CocoDataModule, processes: int
) -> dict[str, Any]:
    """The options that decide a run's weights, as plain values by name.

    The architecture of the model is not among them, because weights of another one cannot be used at all.

    Args:
        config: of ``train``.
        module: knows the settings of model and schedule.
        datamodule: knows the settings of the data.
        processes: number of processes of the run.
    """
    data = datamodule.settings.to_dict()
    values = {f"schedule.{name}": value for name, value in module.schedule.to_dict().items()}
    values |= {f"data.{name}": data[name] for name in (*datamodule.settings.names("training"), *_DATA)}
    values |= module.model.settings.training()
    values |= {"seed": config.seed, "processes": processes, "ema": config.ema}
    trainer = ("accumulate_grad_batches", "precision", "gradient_clip_val", "compile")
    values |= {f"trainer.{name}": config.trainer[name] for name in trainer}
    return {name: value for name, value in values.items() if name not in _MAY_CHANGE}
