"""Construction of data modules, models and detectors from a config."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from cpm_rcnn.cli.config import as_path, config_keys, overrides_in, to_dict
from cpm_rcnn.cli.instantiate import instantiate_allowed
from cpm_rcnn.cli.nodes import check_operating_precision, data_with_paths, schedule_settings
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.data.splits import DataSplits
from cpm_rcnn.errors import UserError, check_choice, check_count, check_file, check_flag, check_path, shown
from cpm_rcnn.inference import Detector, MultiScaleSettings
from cpm_rcnn.inference.detector import SIZE_OPTIONS
from cpm_rcnn.inference.load import detector_from
from cpm_rcnn.models.backbones import InputFormat
from cpm_rcnn.remote.urls import check_url, is_url
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.weights.checkpoints import checkpoint_file, read_checkpoint

# The dtypes of ``precision`` in ``eval`` and ``predict``.
PRECISIONS = {32: torch.float32, "bf16": torch.bfloat16}


def build_datamodule(config: DictConfig, splits: DataSplits | None = None) -> CocoDataModule:
    """The data module of a training run; a data set that it generates is generated now.

    Args:
        config: the config.
        splits: the splits of a data module of the same data, so that nothing is read twice.

    Raises:
        UserError: a value is invalid.
    """
    schedule = schedule_settings(config)
    check_count("trainer.accumulate_grad_batches", config.trainer.accumulate_grad_batches)
    with config_keys(config, "data"):
        datamodule = instantiate_allowed(
            data_with_paths(config.data),
            "cpm_rcnn.data.",
            batch_size=schedule.images_per_device,
            max_steps=schedule.max_steps * config.trainer.accumulate_grad_batches,
            seed=config.seed,
            convention=config.detector.convention,
        )
        # Lightning would call it when the run starts, but the classes are needed earlier, to build the model.
        datamodule.prepare_data()
    if splits is not None:
        datamodule.splits = splits
    return datamodule


def check_files(config: DictConfig, datamodule: CocoDataModule) -> None:
    """Check the files of a training run. Lightning would do so too, after a model is built and loggers are started.

    Raises:
        UserError: a file or an image is missing or invalid.
    """
    with config_keys(config, "data"):
        datamodule.setup("fit")
        # Refuses data without a validation split, which setup allows.
        datamodule.annotations("val")


def build_module(
    config: DictConfig, datamodule: CocoDataModule, input_format: InputFormat | None = None
) -> DetectionModule:
    """The module of a training run, with random weights.

    Args:
        config: the config.
        datamodule: the data of the run.
        input_format: of the weights that the run starts from or resumes, which ``backbone.input_format=null`` means.

    Raises:
        UserError: a value is invalid.
    """
    with config_keys(config, "data"):
        categories, data = datamodule.categories, datamodule.evaluation_arguments
    backbone = to_dict(config.backbone)
    if backbone["input_format"] is None and input_format is not None:
        backbone["input_format"] = input_format.to_dict()
    check_operating_precision(config)
    with config_keys(config, "detector"):
        module = DetectionModule(
            model={"backbone": backbone, **to_dict(config.detector)},
            categories=categories,
            schedule=schedule_settings(config).to_dict(),
            data=data,
        )
    module.operating_precision = config.operating_precision
    return module


def load_detector(config: DictConfig) -> tuple[Detector, dict[str, Any]]:
    """The detector of ``ckpt``, and the arguments of its data module, with the overrides of ``detector`` and ``data``.

    The detector is optimized for inference in ``precision``, or in float32 if the command has no such option.

    Raises:
        UserError: the file does not exist, is damaged, or is a checkpoint of another program or format, or a value is
            invalid.
    """
    precision = config.get("precision", 32)
    check_choice("precision", precision, list(PRECISIONS))
    path = checkpoint_file(as_path(config.ckpt), "ckpt")
    checkpoint = read_checkpoint(path, "ckpt")
    data = checkpoint["hyper_parameters"]["data"] | overrides_in(data_with_paths(config.data))
    overrides = overrides_in(config.detector) | {name: data[name] for name in SIZE_OPTIONS if name in data}
    multi_scale = multi_scale_settings(config)
    with config_keys(config, "detector"):
        detector = detector_from(checkpoint, f"ckpt={path}", multi_scale=multi_scale, **overrides)
    return detector.optimize(PRECISIONS[precision]), data


def multi_scale_settings(config: DictConfig) -> MultiScaleSettings | None:
    """The settings of ``multi_scale``; None if it is off or the command has no such node."""
    values = to_dict(config.multi_scale) if "multi_scale" in config else {"enabled": False}
    with config_keys(config, "multi_scale"):
        check_flag("enabled", values["enabled"])
        if not values.pop("enabled"):
            return None
        return MultiScaleSettings.from_dict(values)


def evaluation_data(config: DictConfig, detector: Detector, data: dict[str, Any]) -> CocoDataModule:
    """The data on which a detector is evaluated.

    Args:
        config: the config of ``eval``. ``split`` is val, test, or a COCO-style json that becomes the test split, with
            its images in ``images``.
        detector: the detector, which defines the classes and the box convention.
        data: the second value that :func:`load_detector` returns.

    Raises:
        UserError: there is no such split, or a value is invalid.
    """
    if config.split not in ("val", "test"):
        allowed = "val, test, or a COCO-style json with images=FOLDER_OR_ZIP, also for the training images"
        if config.split is None:
            raise UserError(f"split=null: must be {allowed}")
        json = _absolute("split", config.split, lambda path: check_file("split", path, allowed))
        if config.images is None:
            raise UserError(f"split={config.split}: give its images with images=FOLDER_OR_ZIP")
        data = data | {"test_json": json, "test_images": _absolute("images", config.images, _images_path)}
    elif config.images is not None:
        raise UserError(f"images={shown(config.images)}: belongs to split=JSON; split={config.split} has data.*_images")
    if detector.takes_original_sizes:
        data = data | {"test_short_side": None}
    with evaluation_keys(config):
        return CocoDataModule(**data, categories=detector.categories, convention=detector.convention.name)


def _images_path(value: Any) -> Path:
    """The existing folder of ``images``, which may be a .zip file of that name."""
    images = check_path("images", value)
    if not images.exists() and not Path(f"{images}.zip").is_file():
        raise UserError(f"images={images}: no such folder and no such .zip")
    return images


def _absolute(argument: str, value: Any, check: Callable[[Any], Path]) -> str:
    """A URL as it is, or an absolute path that ``check`` has found to exist."""
    check_url(argument, value)
    return value if is_url(value) else str(check(as_path(value)).absolute())


def evaluation_keys(config: DictConfig) -> AbstractContextManager[None]:
    """:func:`~cpm_rcnn.cli.config.config_keys` for the arguments of the data on which a detector is evaluated."""
    own = config.split not in ("val", "test")
    return config_keys(config, "data", {"test_json": "split", "test_images": "images"} if own else None)
