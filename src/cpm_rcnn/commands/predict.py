"""Detect in images and videos."""

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from math import inf
from pathlib import Path
from time import perf_counter

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cpm_rcnn.cli.assembly import load_detector
from cpm_rcnn.cli.config import overrides_in
from cpm_rcnn.data.problem import counted
from cpm_rcnn.data.source_reader import SourceReader
from cpm_rcnn.data.sources import SourceFile
from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import Detector
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.predictions import OUTPUTS, Output, OutputOptions

_log = logging.getLogger(__name__)

# The minimum score of classes without a point of best F1.
DEFAULT_MIN_SCORE = 0.3


def predict_files(config: DictConfig, files: Sequence[SourceFile]) -> None:
    """Detect in images and videos; write the results to Hydra's output folder.

    If there are several files, those that cannot be read are reported and skipped; the exit status is then 1.

    Args:
        config: the config of ``predict``.
        files: the images and videos.
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
    options = OutputOptions(run_dir, detector.class_names, min_scores, files)
    reader = SourceReader(files, config.video_stride)
    watch = Stopwatch()
    with _sigterm_closes_files(), ExitStack() as stack:
        outputs = [stack.enter_context(closing(OUTPUTS[kind](options))) for kind in kinds]
        count = detect(detector, reader, outputs, config.batch_size, config.details, watch)
    parts = [counted(count, "detection", "detections")]
    if reader.frames:
        parts.insert(0, counted(reader.frames, "video frame", "video frames"))
    if reader.images or not reader.frames:
        parts.insert(0, counted(reader.images, "image", "images"))
    read = reader.images + reader.frames
    times = f"; milliseconds per image: {watch.per(read)}" if read else ""
    print(f"{', '.join(parts)}{times}")
    print(run_dir)
    if reader.skipped:
        of = counted(len(files), "file", "files")
        print(f"error: {reader.skipped} of {of} could not be read completely, see above", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _sigterm_closes_files() -> Iterator[None]:
    """Let SIGTERM, which clusters and containers send, end the program like Ctrl-C, with all files complete."""

    def stop(number: int, frame: object) -> None:
        print("stopped by SIGTERM", file=sys.stderr)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


def detect(
    detector: Detector,
    reader: SourceReader,
    outputs: Sequence[Output],
    batch_size: int,
    details: bool,
    watch: Stopwatch,
) -> int:
    """Detect in all images of a reader, with a progress bar.

    Args:
        detector: the detector.
        reader: reads the images.
        outputs: receive the detections.
        batch_size: images per forward pass.
        details: see :meth:`Detector.detect`.
        watch: measures the parts ``read``, ``detect`` and ``write``.

    Returns:
        The number of detections.
    """
    count = 0
    images = iter(reader)
    columns = (
        TextColumn("predict"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns) as bar, logging_above_bar():
        task = bar.add_task("predict", total=reader.total)

        def show(done: float) -> None:
            bar.update(task, completed=position + done, total=reader.total)

        while True:
            position = reader.position
            with watch("read"):
                batch = list(islice(images, batch_size))
            if not batch:
                bar.update(task, completed=reader.position, total=reader.total)
                return count
            with watch("detect"):
                pixels = [image.pixels for image in batch]
                results = detector.detect(pixels, batch_size=batch_size, details=details, progress=show)
            with watch("write"):
                for image, found in zip(batch, results):
                    count += len(found)
                    for output in outputs:
                        output.add(image, found)


@contextmanager
def logging_above_bar() -> Iterator[None]:
    """Show log messages above a progress bar on a terminal, not inside it.

    The bar replaces ``sys.stdout`` to that end, but Hydra's handler has the original one.
    """
    handlers = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    originals = [handler.setStream(sys.stdout) for handler in handlers]
    try:
        yield
    finally:
        for handler, original in zip(handlers, originals):
            if original is not None:
                handler.setStream(original)


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
    changed = [f"{node}.{name}" for node in ("detector", "data") for name in overrides_in(config[node])]
    changed += ["multi_scale"] if detector.multi_scale is not None else []
    if changed:
        _log.warning(
            "min_score=%s: the thresholds were measured in a validation without %s, and may not suit it",
            *(config.min_score, ", ".join(changed)),
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
