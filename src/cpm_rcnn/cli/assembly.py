"""From a config to the parts of a run: data module, module, Trainer."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from cpm_rcnn.callbacks import AtomicCheckpointIO, EvaluationSignals, Interruption, NonFiniteGuard, StepSeed
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint

from cpm_rcnn.boxes import CONVENTIONS
from cpm_rcnn.cli.instantiate import make
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.errors import UserError, check_count
from cpm_rcnn.inference.multi_scale import MultiScaleDetector
from cpm_rcnn.models.backbones.build import default_pixel_format
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.training.progress import LossProgressBar
from cpm_rcnn.training.schedule import Schedule
from cpm_rcnn.training.throughput import Throughput
from cpm_rcnn.training.tolerant_logger import TolerantLogger
from cpm_rcnn.weights.checkpoints import read_checkpoint
from cpm_rcnn.weights.files import check_names
from cpm_rcnn.weights.initialize import start_from


def check_room(run_dir: Path, module: DetectionModule) -> None:
    """Refuse to start a run whose checkpoints will not fit on its disk.

    Raises:
        UserError: there is less room than the best and the last checkpoint, and one that is being written, will take.
    """
    weights = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    per_weight = 3 if module.schedule.optimizer == "adamw" else 2  # itself and what the optimizer keeps of it
    needed, free = 3 * per_weight * weights, shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(f"{run_dir}: {free / 1e9:.2f} GB are free, the run's checkpoints take {needed / 1e9:.2f} GB")


def plain(node: DictConfig) -> dict[str, Any]:
    """A config node as plain values, interpolations resolved; what checkpoints store."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def recipe(config: DictConfig) -> dict[str, Any]:
    """The arguments of :class:`~cpm_rcnn.training.schedule.Schedule`, found to be in range.

    Raises:
        UserError: a value of ``schedule`` that is out of range.
    """
    values = plain(config.schedule)
    check_count("schedule.images_per_device", values["images_per_device"])
    check_count("schedule.val_interval", values["val_interval"])
    arguments = {field.name: values[field.name] for field in fields(Schedule)}
    Schedule(**arguments)
    return arguments


def build_datamodule(config: DictConfig) -> CocoDataModule:
    """The data module of a training run, its files in place."""
    recipe(config)  # before the length of the run is used
    check_count("trainer.accumulate_grad_batches", config.trainer.accumulate_grad_batches)
    datamodule = make(
        config.data,
        batch_size=config.schedule.images_per_device,
        max_steps=config.schedule.max_steps * config.trainer.accumulate_grad_batches,
        convention=config.detector.convention,
    )
    # Lightning would do so when the run starts, but the model wants to know the classes first.
    datamodule.prepare_data()
    return datamodule


def model_arguments(config: DictConfig, goes_on: bool = False) -> dict[str, Any]:
    """The arguments of ``build_detector`` but ``num_classes``, of a new run or of one that goes on."""
    node = config.backbone.copy()
    if config.init is not None or goes_on:
        # The detector's weights bring the backbone's, whose file need not be at hand.
        node.weights = None
    backbone = plain(node)
    # Settled here, so that a checkpoint does not depend on what a later timm says of the model.
    backbone["pixel_format"] = backbone["pixel_format"] or default_pixel_format(backbone["name"])
    return {
        "backbone": backbone,
        "stages": plain(config.cmm)["stages"],
        "ism": config.ism.enabled,
        "rsm": config.rsm.enabled,
        "fusion": config.fusion.enabled,
        **plain(config.detector),
    }


def build_module(config: DictConfig, datamodule: CocoDataModule, goes_on: bool = False) -> DetectionModule:
    """The module of a training run, with its starting weights unless it goes on with those of a checkpoint."""
    module = DetectionModule(
        model=model_arguments(config, goes_on),
        categories=datamodule.categories,
        schedule=recipe(config),
        data=datamodule.evaluation_arguments,
    )
    if config.init is not None and not goes_on:
        start_from(module, config.init)
    return module


def build_trainer(config: DictConfig, run_dir: Path) -> pl.Trainer:
    """The Trainer of a training run: checkpoints, logs and progress under ``run_dir``."""
    if config.trainer.limit_val_batches == 0:
        raise UserError(
            "trainer.limit_val_batches=0: the best checkpoint is chosen by validation; null means all batches"
        )
    steps = config.schedule.max_steps
    callbacks: list[Callback] = [
        LossProgressBar(refresh_rate=config.trainer.log_every_n_steps),
        Throughput(),
        StepSeed(config.seed),
        NonFiniteGuard(config.on_nonfinite, run_dir),
        EvaluationSignals(),
    ]
    if not config.trainer.fast_dev_run:
        folder = run_dir / "checkpoints"
        check_count("checkpoint_interval", config.checkpoint_interval)
        interval = config.checkpoint_interval
        callbacks += [
            ModelCheckpoint(folder, filename="best", monitor="val/AP", mode="max", enable_version_counter=False),
            # Without a monitor it follows every validation; ``save_last`` would follow a new best only.
            ModelCheckpoint(folder, filename="last", enable_version_counter=False),
            ModelCheckpoint(folder, filename="last", every_n_train_steps=interval, enable_version_counter=False),
            LearningRateMonitor("step"),
            Interruption(folder / "last.ckpt"),
        ]
    return make(
        config.trainer,
        max_steps=steps,
        max_epochs=-1,
        # In batches, as Lightning counts.
        val_check_interval=min(config.schedule.val_interval, steps) * config.trainer.accumulate_grad_batches,
        callbacks=callbacks,
        logger=[TolerantLogger(make(logger, save_dir=str(run_dir))) for logger in config.logger.values()],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run_dir),
        # The data module shards by itself: its order is a function of step and rank.
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def build_evaluator(config: DictConfig, run_dir: Path) -> pl.Trainer:
    """The Trainer of an evaluation: no logs, no checkpoints."""
    return make(
        config.trainer,
        callbacks=[LossProgressBar(refresh_rate=config.trainer.log_every_n_steps), EvaluationSignals()],
        logger=False,
        enable_checkpointing=False,
        default_root_dir=str(run_dir),
        use_distributed_sampler=False,
        enable_model_summary=False,
    )


def load_module(path: str | Path, **overrides: Any) -> DetectionModule:
    """The module of a checkpoint, in eval mode on the CPU.

    Args:
        path: a checkpoint that ``train`` or ``convert`` wrote.
        **overrides: arguments of ``build_detector`` that replace the checkpoint's (``score_threshold``, ``nms_iou``);
            ``ism=False`` and ``rsm=False`` leave those parts out.

    Raises:
        UserError: no such file, a damaged file, or a checkpoint of another program or model.
    """
    checkpoint = read_checkpoint(path)
    arguments = checkpoint["hyper_parameters"]
    model = {**arguments["model"], **overrides}
    # The checkpoint's own weights follow; the starting point need not be at hand.
    model["backbone"] = {**model["backbone"], "weights": None}
    try:
        module = DetectionModule(**{**arguments, "model": model})
    except TypeError as error:
        raise UserError(f"ckpt={path}: of another version of this program ({error})") from None
    except UserError as error:
        raise UserError(f"ckpt={path}: {error}") from None
    state = checkpoint["state_dict"]
    for part in ("ism", "rsm"):
        if overrides.get(part) is False:
            state = {name: value for name, value in state.items() if not name.startswith(f"detector.head.{part}.")}
    check_names(f"ckpt={path}", state, {name: value.shape for name, value in module.state_dict().items()})
    module.load_state_dict(state)
    return module.eval()


def given(node: DictConfig) -> dict[str, Any]:
    """The values of a config node that are not null: what replaces a checkpoint's own."""
    return {key: value for key, value in plain(node).items() if value is not None}


def evaluation_data(config: DictConfig, module: DetectionModule) -> CocoDataModule:
    """The data that a module is evaluated on.

    Args:
        config: ``split`` (val, test, or a COCO-style json with ``images`` beside it, which becomes the test split), and
            ``data``, whose values replace the checkpoint's where they are not null.
        module: from a checkpoint; knows the data that it was trained with, and its classes.

    Raises:
        UserError: no such split, or a value out of range.
    """
    data = module.hparams["data"] | given(config.data)
    if config.split not in ("val", "test"):
        if config.images is None:
            raise UserError(
                f"split={config.split}: must be val, test, or a COCO-style json with images=FOLDER_OR_ZIP beside it"
            )
        data["test_json"] = str(Path(config.split).expanduser().absolute())
        data["test_images"] = str(Path(config.images).expanduser().absolute())
    if config.multi_scale.enabled:
        # The multi-scale detector resizes by itself.
        data["test_short_side"] = None
    return CocoDataModule(
        **data, categories=module.hparams["categories"], convention=module.hparams["model"]["convention"]
    )


def use_multi_scale(config: DictConfig, module: DetectionModule) -> None:
    """Make ``module`` detect at the scales of ``config.multi_scale``, if that is on."""
    arguments = plain(config.multi_scale)
    if arguments.pop("enabled"):
        pixels = CONVENTIONS[module.hparams["model"]["convention"]]
        module.detector = MultiScaleDetector(module.detector, **arguments, convention=convention)  # type: ignore[assignment]
