"""Settings of nodes and options of a config that can be checked without torch."""

import copy
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.cli.config import as_path, config_keys, to_dict
from cpm_rcnn.data.formats import find_layout
from cpm_rcnn.data.settings import DataSettings, ShapesSettings
from cpm_rcnn.errors import ArgumentError, UserError, check_keys, check_path
from cpm_rcnn.remote.urls import check_url, is_url, location
from cpm_rcnn.settings import number, optional
from cpm_rcnn.training.schedule import Schedule

AUTO = "auto"
# The options that may be ``auto``, with values that no other option contradicts, for the time before they are chosen.
# ``schedule.epochs`` may be auto too (:mod:`cpm_rcnn.cli.epochs`).
PROVISIONAL: Mapping[str, Any] = {
    "schedule.short_sides": [1],
    "schedule.max_size": 100_000,
    "schedule.test_short_side": 1,
    "schedule.test_max_size": 100_000,
    "schedule.images_per_device": 1,
    "schedule.base_lr": 0.0,
    "detector.proposals_train": 1000,
    "detector.proposals_test": 1000,
    "backbone.frozen_stages": 0,
}
_DATA: dict[str, type[DataSettings]] = {
    "cpm_rcnn.data.CocoDataModule": DataSettings,
    "cpm_rcnn.data.ShapesDataModule": ShapesSettings,
}


def with_values(config: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """A copy of a config with other values of some options, by key."""
    config = copy.deepcopy(config)
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    return config


def provisional(config: DictConfig) -> DictConfig:
    """A copy of a config in which no option is ``auto``, for checks of all other options."""
    automatic = {key: value for key, value in PROVISIONAL.items() if OmegaConf.select(config, key) == AUTO}
    return with_values(config, automatic)


def schedule_settings(config: DictConfig) -> Schedule:
    """The settings of ``schedule``; the image sizes in that node are settings of the data module.

    Raises:
        UserError: a value is invalid.
    """
    values = to_dict(config.schedule)
    with config_keys(config, "schedule"):
        # The image sizes are read from the data node, which refers to them.
        check_keys(None, values, [*Schedule.names(), *DataSettings.names()])
        return Schedule.from_dict({name: values[name] for name in Schedule.names() if name in values})


def check_data_settings(config: DictConfig) -> None:
    """Check the values of ``data`` for training; other options in that node are left to the data module.

    Raises:
        UserError: a value is invalid, or ``root`` has no data set in a known format.
    """
    values = to_dict(data_with_paths(config.data))
    kind = _DATA.get(str(values.get("_target_")))
    if kind is None:
        return
    with config_keys(config, "data"):
        settings = kind.from_dict({name: values[name] for name in kind.names() if name in values})
        if kind is not DataSettings or settings.train_json is not None:
            return
        named = "train_json=FILE.json train_images=FOLDER_OR_ZIP"
        if settings.val_json is not None:
            raise ArgumentError("train_json", f"=null: give the training annotations and images, {named}")
        if settings.root is None:
            raise ArgumentError("root", f"=null: give the folder of the data, root=FOLDER, or its files, {named}")
        find_layout(location(settings.root), settings.format)


def data_with_paths(data: DictConfig) -> DictConfig:
    """The ``data`` node with all paths as strings."""
    names = [name for name in data if name == "root" or str(name).endswith(("_json", "_images"))]
    return OmegaConf.merge(data, {name: as_path(data[name]) for name in names})  # type: ignore[return-value]


def check_operating_precision(config: DictConfig) -> None:
    """Raise :class:`UserError` unless ``operating_precision`` is null or a number from 0 to 1."""
    optional(number(0, 1))("operating_precision", config.operating_precision)


def check_ckpt(config: DictConfig) -> None:
    """Raise :class:`UserError` unless ``ckpt`` is an existing path or a URL; its content is checked when it is read."""
    check_url("ckpt", config.ckpt)
    if is_url(config.ckpt):
        return
    if not check_path("ckpt", as_path(config.ckpt)).exists():
        raise UserError(f"ckpt={config.ckpt}: no such file")
