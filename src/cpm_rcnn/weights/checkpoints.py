"""Checkpoint files of this project. Only tensors and plain values are read from them; no code is executed."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from cpm_rcnn.errors import ArgumentError, UserError, check_path
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.remote.urls import is_url
from cpm_rcnn.weights.reading import named_tensors, read_file
from cpm_rcnn.weights.writing import write_atomically

_log = logging.getLogger(__name__)

# Increased whenever the meaning of stored settings or parameter names changes. Version 0.1.0 stored no number.
FORMAT = 2
# The entry for score thresholds of the last validation, if it was of the weights in the checkpoint.
OPERATING_POINTS = "operating_points"
# The arguments that ``DetectionModule`` stores, in addition to the format, and their types.
_HYPERPARAMETERS = {"model": dict, "categories": list, "schedule": dict, "data": dict}
# The detector's parameters are stored under the name that it has in ``DetectionModule``.
_PREFIX = "model."


def read_checkpoint(path: str | Path, argument: str = "ckpt") -> dict[str, Any]:
    """A checkpoint that ``train`` or ``convert`` wrote.

    Args:
        path: the file.
        argument: name of the argument that ``path`` comes from, for messages.

    Returns:
        ``hyper_parameters`` (arguments of ``DetectionModule``), ``state_dict``, and, from ``train``, Lightning's other
        entries.

    Raises:
        UserError: the file does not exist, is damaged, or is a checkpoint of another program or format.
    """
    source = f"{argument}={path}"
    checkpoint = read_file(path, argument)
    check_checkpoint(checkpoint, source)
    return checkpoint


def checkpoint_file(value: Any, argument: str) -> Any:
    """The checkpoint that the user means: a file, or one of a run's folder.

    Of a folder, it is the checkpoint that the run's ``metrics.json`` reports, otherwise the best, otherwise the last.

    Args:
        value: a path, or the URL of a file.
        argument: the argument that named it, for messages.

    Raises:
        UserError: a folder without a checkpoint.
    """
    if is_url(value) or not (path := check_path(argument, value)).is_dir():
        return value
    names = ["last", "best"] if _selected(path) == "last" else ["best", "last"]
    for file in [*(path / "checkpoints" / f"{name}.ckpt" for name in names), path / "best.ckpt", path / "last.ckpt"]:
        if file.is_file():
            _log.warning("%s=%s: using %s", argument, value, file)
            return file
    raise UserError(f"{argument}={value}: is a folder without checkpoints/best.ckpt and checkpoints/last.ckpt")


def _selected(run_dir: Path) -> Any:
    """The name of the checkpoint that a finished run reports; None if that is unknown."""
    try:
        return json.loads((run_dir / "metrics.json").read_text("utf-8")).get("selected")
    except (OSError, ValueError, AttributeError):
        return None


def check_checkpoint(checkpoint: Any, source: str) -> None:
    """Raise :class:`UserError` unless ``checkpoint`` is one that this version of the project can use.

    Args:
        checkpoint: the content of a file.
        source: where it came from, for messages.
    """
    known = isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), dict)
    arguments = checkpoint.get("hyper_parameters") if known else None
    if not isinstance(arguments, dict) or not set(arguments) >= set(_HYPERPARAMETERS):
        raise UserError(
            f"{source}: not a checkpoint of cpm_rcnn.train; convert released weights with cpm_rcnn.convert first"
        )
    check_format(arguments.get("format"), source)
    for name, kind in _HYPERPARAMETERS.items():
        if not isinstance(arguments[name], kind):
            raise UserError(f"{source}: {name} is of type {type(arguments[name]).__name__}; the file is damaged")
    categories = arguments["categories"]
    if not categories or not all(isinstance(item, dict) and {"id", "name"} <= item.keys() for item in categories):
        raise UserError(f"{source}: its classes do not have an id and a name each; the file is damaged")
    named_tensors(checkpoint["state_dict"], source)


def check_format(number: Any, source: str) -> None:
    """Raise :class:`UserError` unless ``number`` is the format that this version reads."""
    if number == FORMAT:
        return
    if number is None:
        found = "written before format numbers, by version 0.1.0 or earlier"
    else:
        found = f"of checkpoint format {number}"
    raise UserError(
        f"{source}: {found}; this version reads format {FORMAT}: use the version that wrote the file, or train or "
        "convert again"
    )


def write_checkpoint(path: Path, weights: Mapping[str, Tensor], hyper_parameters: Mapping[str, Any]) -> None:
    """Write weights as a checkpoint without optimizer and loop states.

    Args:
        path: the file.
        weights: the detector's parameters and buffers by name.
        hyper_parameters: arguments of ``DetectionModule`` except ``format``.

    Raises:
        UserError: the file cannot be written.
    """
    checkpoint = {
        "pytorch-lightning_version": pl.__version__,
        "epoch": 0,
        "global_step": 0,
        "hyper_parameters": {**hyper_parameters, "format": FORMAT},
        "state_dict": {f"{_PREFIX}{name}": value for name, value in weights.items()},
    }
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def stored_settings(checkpoint: Mapping[str, Any], source: str, **overrides: Any) -> ModelSettings:
    """The model settings of a checkpoint.

    Args:
        checkpoint: content of a checkpoint of ``train`` or ``convert``.
        source: the argument and file, for messages.
        **overrides: options that replace the checkpoint's.

    Raises:
        ArgumentError: an override is invalid.
        UserError: the stored settings are invalid.
    """
    options = dict(checkpoint["hyper_parameters"]["model"])
    try:
        return ModelSettings.from_options(**{**options, **overrides})
    except ArgumentError as error:
        if error.argument in overrides:
            raise
        raise UserError(f"{source}: {error}") from None
    except TypeError as error:
        raise UserError(f"{source}: its model settings are damaged ({error})") from None


def stored_operating_points(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """The operating points of each class in a checkpoint of ``train``; None if it has none.

    Args:
        checkpoint: content of a checkpoint.
        source: the argument and file, for messages.

    Raises:
        UserError: they are damaged.
    """
    stored = checkpoint.get(OPERATING_POINTS)
    if stored is None:
        return None
    try:
        found = [stored["iou"], 0.0 if stored["target_precision"] is None else stored["target_precision"]]
        for each in stored["classes"].values():
            hash(each["id"])
            found += [each["objects"] / (1 + each["objects"])]
            for point in filter(None, (each["best_f1"], each["precision"])):
                found += [point[name] for name in ("threshold", "precision", "recall", "f1")]
        if not all(0 <= number <= 1 for number in found):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        raise UserError(f"{source}: its operating points are damaged") from None
    return dict(stored)


def detector_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The detector's parameters and buffers in a checkpoint, by their names in the detector."""
    state = checkpoint["state_dict"]
    return {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}


def class_names(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of the classes 1..C of a checkpoint."""
    return [category["name"] for category in checkpoint["hyper_parameters"]["categories"]]
