"""Settings of nodes and options of a config that can be checked without torch."""

from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.cli.config import as_path, config_keys, to_dict
from cpm_rcnn.data.settings import DataSettings, ShapesSettings
from cpm_rcnn.errors import UserError, check_keys, check_path
from cpm_rcnn.settings import number, optional
from cpm_rcnn.training.schedule import Schedule

_DATA: dict[str, type[DataSettings]] = {
    "cpm_rcnn.data.CocoDataModule": DataSettings,
    "cpm_rcnn.data.ShapesDataModule": ShapesSettings,
}


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
        UserError: a value is invalid.
    """
    values = to_dict(data_with_paths(config.data))
    kind = _DATA.get(str(values.get("_target_")))
    if kind is not None:
        with config_keys(config, "data"):
            kind.from_dict({name: values[name] for name in kind.names() if name in values})


def data_with_paths(data: DictConfig) -> DictConfig:
    """The ``data`` node with all paths as strings."""
    names = [name for name in data if name == "root" or str(name).endswith(("_json", "_images"))]
    return OmegaConf.merge(data, {name: as_path(data[name]) for name in names})  # type: ignore[return-value]


def check_operating_precision(config: DictConfig) -> None:
    """Raise :class:`UserError` unless ``operating_precision`` is null or a number from 0 to 1."""
    optional(number(0, 1))("operating_precision", config.operating_precision)


def check_ckpt(config: DictConfig) -> None:
    """Raise :class:`UserError` unless ``ckpt`` is an existing path; what it contains is checked when it is read."""
    if not check_path("ckpt", as_path(config.ckpt)).exists():
        raise UserError(f"ckpt={config.ckpt}: no such file")
