"""``python -m cpm_rcnn.predict ckpt=PATH source=FILE_OR_FOLDER``: detect in images and videos."""

import re
from typing import Any

from omegaconf import DictConfig, ListConfig

from cpm_rcnn.cli.main import run
from cpm_rcnn.cli.nodes import check_ckpt
from cpm_rcnn.data.sources import find_sources
from cpm_rcnn.errors import ArgumentError, UserError, check_count, check_flag, check_range, shown
from cpm_rcnn.settings import choice, list_of

# The operating points that ``min_score`` can name.
AUTOMATIC = ("auto", "precision")
# Kinds of output (:mod:`cpm_rcnn.reporting.predictions`).
OUTPUTS = ("pictures", "coco", "csv", "yolo", "crops")


def predict(config: DictConfig) -> None:
    """Detect in all images and videos of ``source``; write the results to Hydra's output folder.

    If there are several, those that cannot be read are reported and skipped; the exit status is then 1.
    """
    check_min_score(config.min_score)
    check_flag("details", config.details)
    check_count("batch_size", config.batch_size)
    check_count("video_stride", config.video_stride)
    check_output(config.output)
    check_device(config.device)
    check_ckpt(config)
    files = find_sources(config.source)
    # Imported after the checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.predict import predict_files

    predict_files(config, files)


def check_min_score(value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is a number from 0 to 1, ``auto`` or ``precision``."""
    if value in AUTOMATIC:
        return
    try:
        check_range("min_score", value, 0, 1)
    except ArgumentError as error:
        raise UserError(f"{error}, auto (best F1 per class) or precision (the checkpoint's target precision)") from None


def check_output(value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is one of :data:`OUTPUTS`, or a list of some of them."""
    values = list(value) if isinstance(value, ListConfig) else [value] if isinstance(value, str) else value
    list_of(choice(*OUTPUTS))("output", values)


def check_device(value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is the name of a device, which this machine may not have."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", value):
        raise UserError(f"device={shown(value)}: must be auto, cpu, cuda, or a GPU such as cuda:1")


def main() -> None:
    run(predict, "predict")


if __name__ == "__main__":
    main()
