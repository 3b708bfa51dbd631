"""Draw the detections on copies of images."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from math import inf
from pathlib import Path
from time import perf_counter

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor

from cpm_rcnn.cli.assembly import load_detector
from cpm_rcnn.cli.config import overrides_in
from cpm_rcnn.data import ImageSource
from cpm_rcnn.data.problem import counted
from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import Detector
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.predictions import OUTPUTS

_log = logging.getLogger(__name__)

# The minimum score of classes without a point of best F1.
DEFAULT_MIN_SCORE = 0.3


def predict_images(config: DictConfig, folder: Path, names: list[str]) -> None:
    """Detect in images; write the results to Hydra's output folder.

    If there are several images, those that cannot be read are reported and skipped; the exit status is then 1.

    Args:
        config: the config of ``predict``.
        folder: the folder of the images.
        names: the images to read, relative to it.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    use_deform_backend(config.ops.deform)
    device = choose_device(config.device)
    detector, _ = load_detector(config)
    if detector.tile is not None:
        overlap = f"an overlap of {detector.tile_overlap:g}"
        print(f"tiles of {detector.tile} pixels with {overlap}; data.tile=null detects in whole images")
    scores = automatic_scores(config, detector) if isinstance(config.min_score, str) else config.min_score
    min_scores = scores if isinstance(scores, list) else [scores] * len(detector.class_names)
    detector.to(device)
    kinds = [config.output] if isinstance(config.output, str) else dict.fromkeys(config.output)
    outputs = [OUTPUTS[kind](run_dir, detector.class_names, min_scores) for kind in kinds]
    watch = Stopwatch()
    source = ImageSource(folder)
    skipped = count = 0

    def images() -> Iterator[tuple[int, str, Tensor]]:
        nonlocal skipped
        for image_id, name in enumerate(track(names, description="predict"), start=1):
            try:
                with watch("read"):
                    image = source.read(name)
            except UserError as error:
                if len(names) == 1:
                    raise UserError(f"source={folder / name}: {str(error).removeprefix(f'{folder}: ')}") from error
                skipped += 1
                _log.warning("%s; skipped", error)
                continue
            yield image_id, name, image

    readable = images()
    while batch := list(islice(readable, config.batch_size)):
        with watch("detect"):
            tensors = [image for _, _, image in batch]
            results = detector.detect(tensors, batch_size=config.batch_size, details=config.details)
        with watch("write"):
            for (image_id, name, image), found in zip(batch, results):
                count += len(found)
                for output in outputs:
                    output.add(image_id, name, image, found)
    for output in outputs:
        output.close()
    read = len(names) - skipped
    times = f"; milliseconds per image: {watch.per(read)}" if read else ""
    print(f"{counted(read, 'image', 'images')}, {counted(count, 'detection', 'detections')}{times}")
    print(run_dir)
    if skipped:
        print(f"error: skipped {skipped} of {counted(len(names), 'image', 'images')}, see above", file=sys.stderr)
        sys.exit(1)


class Stopwatch:
    """Sums up the seconds of several parts by name."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure a part."""
        begun = perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + perf_counter() - begun

    def per(self, count: int) -> str:
        """The milliseconds of each part divided by ``count``."""
        return ", ".join(f"{part} {1000 * seconds / count:.1f}" for part, seconds in self._seconds.items())


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
