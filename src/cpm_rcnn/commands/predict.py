"""Draw the detections on copies of images."""

import json
import logging
import sys
from math import inf
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import track

from cpm_rcnn.cli.assembly import load_detector
from cpm_rcnn.cli.config import overrides_in
from cpm_rcnn.data import ImageSource
from cpm_rcnn.data.problem import counted
from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import Detector
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.pictures import draw, save

_log = logging.getLogger(__name__)

# The minimum score of classes without a point of best F1.
DEFAULT_MIN_SCORE = 0.3


def predict_images(config: DictConfig, path: Path, names: list[str]) -> None:
    """Detect in images; write ``images/`` and ``detections.json`` to Hydra's output folder.

    Images of a folder that cannot be read are reported and skipped; the exit status is then 1.

    Args:
        config: the config of ``predict``.
        path: the image, or the folder of images, that the user named.
        names: the images to read, relative to ``path`` if it is a folder; otherwise only its name.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    use_deform_backend(config.ops.deform)
    folder = path if path.is_dir() else path.parent
    device = choose_device(config.device)
    detector, _ = load_detector(config)
    if detector.tile is not None:
        overlap = f"an overlap of {detector.tile_overlap:g}"
        print(f"tiles of {detector.tile} pixels with {overlap}; data.tile=null detects in whole images")
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
        results += [{"file_name": name, **row} for row in found.to_coco(image_id)]
        target = run_dir / "images" / f"{name}.png"
        save(draw(image, found.to_dict(), detector.class_names, min_score=min_score), target)
    (run_dir / "detections.json").write_text(json.dumps(results))
    images = counted(len(names) - skipped, "image", "images")
    print(f"{images}, {counted(len(results), 'detection', 'detections')}")
    print(run_dir)
    if skipped:
        print(f"error: skipped {skipped} of {counted(len(names), 'image', 'images')}, see above", file=sys.stderr)
        sys.exit(1)


def automatic_scores(config: DictConfig, detector: Detector) -> list[float]:
    """The minimum score of each class for ``min_score=auto`` and ``min_score=precision``.

    Raises:
        UserError: the checkpoint has no such thresholds.
    """
    kind = "best_f1" if config.min_score == "auto" else "precision"
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


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a CUDA device if there is one, otherwise the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"device={name}: this machine has no such device ({reason})") from None
    return device
