"""``python -m cpm_rcnn.predict ckpt=PATH source=FILE_OR_FOLDER``: draw the detections on copies of images."""

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cpm_rcnn.cli.config import as_path
from cpm_rcnn.cli.main import run
from cpm_rcnn.cli.nodes import check_ckpt
from cpm_rcnn.errors import ArgumentError, UserError, check_flag, check_path, check_range, shown
from cpm_rcnn.remote.urls import is_url

# The operating points that ``min_score`` can name.
AUTOMATIC = ("auto", "precision")
# Other files in a folder are skipped.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def predict(config: DictConfig) -> None:
    """Detect in every image of ``source``; write ``images/`` and ``detections.json`` to Hydra's output folder.

    Images of a folder that cannot be read are reported and skipped; the exit status is then 1.
    """
    check_min_score(config.min_score)
    check_flag("details", config.details)
    if is_url(config.source):
        raise UserError(f"source={config.source}: must be local, a file or a folder of images")
    path = check_path("source", as_path(config.source))
    names = find_images(path)
    check_device(config.device)
    check_ckpt(config)
    # Imported after the checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.predict import predict_images

    predict_images(config, path, names)


def check_min_score(value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is a number from 0 to 1, ``auto`` or ``precision``."""
    if value in AUTOMATIC:
        return
    try:
        check_range("min_score", value, 0, 1)
    except ArgumentError as error:
        raise UserError(f"{error}, auto (best F1 per class) or precision (the checkpoint's target precision)") from None


def find_images(source: Path) -> list[str]:
    """The sorted names of the images to read, relative to the folder ``source``; for a file, its name.

    Raises:
        UserError: ``source`` does not exist, or is a folder without an image.
    """
    if source.is_file():
        return [source.name]
    if not source.is_dir():
        raise UserError(f"source={source}: no such file or folder")
    names = sorted(
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not names:
        raise UserError(f"source={source}: no image in this folder ({' '.join(IMAGE_SUFFIXES)})")
    return names


def check_device(value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is the name of a device, which this machine may not have."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", value):
        raise UserError(f"device={shown(value)}: must be auto, cpu, cuda, or a GPU such as cuda:1")


def main() -> None:
    run(predict, "predict")


if __name__ == "__main__":
    main()
