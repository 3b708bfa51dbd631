"""``python -m cpm_rcnn.predict ckpt=PATH source=FILE_OR_FOLDER``: draw the detections on copies of images."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import track

from cpm_rcnn.cli.assembly import load_detector
from cpm_rcnn.cli.config import as_path, overrides_in
from cpm_rcnn.cli.main import run
from cpm_rcnn.data import ImageSource
from cpm_rcnn.data.validation import counted
from cpm_rcnn.errors import ArgumentError, UserError, check_flag, check_path, check_range, shown
from cpm_rcnn.evaluation.coco_metric import RESULT_KEYS
from cpm_rcnn.inference import Detector, ImageDetections
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.pictures import draw, save

_log = logging.getLogger(__name__)

# The operating points that ``min_score`` can name, and the minimum score of classes without a point of best F1.
AUTOMATIC = {"auto": "best_f1", "precision": "precision"}
DEFAULT_MIN_SCORE = 0.3
# Other files in a folder are skipped.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def predict(config: DictConfig) -> None:
    """Detect in every image of ``source``; write ``images/`` and ``detections.json`` to Hydra's output folder.

    Images of a folder that cannot be read are reported and skipped; the exit status is then 1.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    use_deform_backend(config.ops.deform)
    check_min_score(config.min_score)
    check_flag("details", config.details)
    path = check_path("source", as_path(config.source))
    folder, names = find_images(path)
    device = choose_device(config.device)
    detector, _ = load_detector(config)
    min_score = automatic_scores(config, detector) if isinstance(config.min_score, str) else config.min_score
    detector.to(device)
    source = ImageSource(folder)
    results = []
    skipped = 0
    for image_id, name in enumerate(track(names, description="predict"), start=1):
        try:
            image = source.read(name)
        except UserError as error:
            if folder / name == path:
                raise UserError(f"source={path}: {str(error).removeprefix(f'{folder}: ')}") from error
            skipped += 1
            _log.warning("%s; skipped", error)
            continue
        (found,) = detector.detect([image], details=config.details)
        results += [{"image_id": image_id, "file_name": name, **row} for row in _rows(found, detector)]
        target = run_dir / "images" / f"{name}.png"
        save(draw(image, found.to_dict(), detector.class_names, min_score=min_score), target)
    (run_dir / "detections.json").write_text(json.dumps(results))
    images = counted(len(names) - skipped, "image", "images")
    print(f"{images}, {counted(len(results), 'detection', 'detections')}")
    print(run_dir)
    if skipped:
        print(f"error: skipped {skipped} of {counted(len(names), 'image', 'images')}, see above", file=sys.stderr)
        sys.exit(1)


def _rows(found: ImageDetections, detector: Detector) -> Iterator[dict[str, Any]]:
    """The detections of an image in COCO's results format, without the image."""
    columns = found.to_dict()
    extra = {key: columns[name].tolist() for name, key in RESULT_KEYS.items() if name in columns}
    boxes = detector.convention.to_xywh(found.boxes).tolist()
    for i, (box, score, label) in enumerate(zip(boxes, found.scores.tolist(), found.labels.tolist())):
        row = {"category_id": detector.categories[label - 1]["id"], "bbox": box, "score": score}
        yield row | {key: values[i] for key, values in extra.items()}


def check_min_score(value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is a number from 0 to 1, ``auto`` or ``precision``."""
    if isinstance(value, str) and value in AUTOMATIC:
        return
    try:
        check_range("min_score", value, 0, 1)
    except ArgumentError as error:
        raise UserError(f"{error}, auto (best F1 per class) or precision (the checkpoint's target precision)") from None


def automatic_scores(config: DictConfig, detector: Detector) -> list[float]:
    """The minimum score of each class for ``min_score=auto`` and ``min_score=precision``.

    Raises:
        UserError: the checkpoint has no such thresholds.
    """
    kind = AUTOMATIC[config.min_score]
    try:
        scores = detector.thresholds(kind)
    except UserError as error:
        reason = str(error).replace("the detector", f"ckpt={config.ckpt}")
        raise UserError(
            f"min_score={config.min_score}: {reason}; train stores them after a validation; give a number, for example "
            f"min_score={DEFAULT_MIN_SCORE}"
        ) from None
    if unknown := [name for name, score in zip(detector.class_names, scores) if score == inf]:
        instead = f"{DEFAULT_MIN_SCORE} is used" if kind == "best_f1" else "not drawn"
        _log.warning("min_score=%s: no threshold for %s; %s", config.min_score, ", ".join(unknown), instead)
    if changed := [f"{node}.{name}" for node in ("detector", "data") for name in overrides_in(config[node])]:
        _log.warning(
            "min_score=%s: the thresholds are of the validation, without %s", config.min_score, ", ".join(changed)
        )
    return [DEFAULT_MIN_SCORE if score == inf and kind == "best_f1" else score for score in scores]


def find_images(source: Path) -> tuple[Path, list[str]]:
    """The folder and the sorted names of the images to read; for a file, its folder and its name.

    Raises:
        UserError: ``source`` does not exist, or is a folder without an image.
    """
    if source.is_file():
        return source.parent, [source.name]
    if not source.is_dir():
        raise UserError(f"source={source}: no such file or folder")
    names = sorted(
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not names:
        raise UserError(f"source={source}: no image in this folder ({' '.join(IMAGE_SUFFIXES)})")
    return source, names


def choose_device(name: Any) -> torch.device:
    """The device of that name; ``auto`` is a CUDA device if there is one, otherwise the CPU.

    Raises:
        UserError: there is no such device.
    """
    if not isinstance(name, str) or not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise UserError(f"device={shown(name)}: must be auto, cpu, cuda, or a GPU such as cuda:1")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"device={name}: this machine has no such device ({reason})") from None
    return device


def main() -> None:
    run(predict, "predict")


if __name__ == "__main__":
    main()
