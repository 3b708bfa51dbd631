"""``python -m cpm_rcnn.predict ckpt=PATH source=FILE_OR_FOLDER``: draw the detections on copies of images."""

import re
from glob import has_magic
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from cpm_rcnn.cli.config import as_path
from cpm_rcnn.cli.main import run
from cpm_rcnn.cli.nodes import check_ckpt
from cpm_rcnn.errors import (
    ArgumentError,
    UserError,
    check_count,
    check_flag,
    check_path,
    check_range,
    shown,
)
from cpm_rcnn.remote.urls import is_url
from cpm_rcnn.settings import choice, list_of

# The operating points that ``min_score`` can name.
AUTOMATIC = ("auto", "precision")
# Kinds of output (:mod:`cpm_rcnn.reporting.predictions`).
OUTPUTS = ("pictures", "coco", "csv", "yolo", "crops")
# Other files in a folder are skipped.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def predict(config: DictConfig) -> None:
    """Detect in every image of ``source``; write the results to Hydra's output folder.

    Images of a folder that cannot be read are reported and skipped; the exit status is then 1.
    """
    check_min_score(config.min_score)
    check_flag("details", config.details)
    if is_url(config.source):
        raise UserError(f"source={config.source}: must be local, an image, a folder or a pattern")
    folder, names = find_images(check_path("source", as_path(config.source)))
    check_count("batch_size", config.batch_size)
    check_output(config.output)
    check_device(config.device)
    check_ckpt(config)
    # Imported after the checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.predict import predict_images

    predict_images(config, folder, names)


def check_min_score(value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is a number from 0 to 1, ``auto`` or ``precision``."""
    if value in AUTOMATIC:
        return
    try:
        check_range("min_score", value, 0, 1)
    except ArgumentError as error:
        raise UserError(f"{error}, auto (best F1 per class) or precision (the checkpoint's target precision)") from None


def find_images(source: Path) -> tuple[Path, list[str]]:
    """The images to read.

    Args:
        source: an image, a folder, or a pattern, in which ``**`` stands for any folders.

    Returns:
        A folder, and the sorted names of the images, relative to it.

    Raises:
        UserError: ``source`` does not exist, matches nothing, or is a folder without an image.
    """
    if source.is_file():
        return source.parent, [source.name]
    if source.is_dir():
        folder, paths = source, source.rglob("*")
        problem = f"no image in this folder ({' '.join(IMAGE_SUFFIXES)})"
    elif has_magic(str(source)):
        parts = source.parts
        fixed = next(k for k, part in enumerate(parts) if has_magic(part))
        folder = Path(*parts[:fixed])
        paths = folder.glob(str(Path(*parts[fixed:])))
        problem = f"matches no image ({' '.join(IMAGE_SUFFIXES)})"
    else:
        raise UserError(f"source={source}: no such file or folder")
    images = (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    names = sorted(str(path.relative_to(folder)) for path in images)
    if not names:
        raise UserError(f"source={source}: {problem}")
    return folder, names


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
