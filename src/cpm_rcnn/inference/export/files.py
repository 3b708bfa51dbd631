"""Write a detector to a file, and keep the file only if it finds what the detector finds."""

import copy
import gc
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cpm_rcnn.errors import ArgumentError, UserError, check_choice, check_count
from cpm_rcnn.inference.detector import Detector
from cpm_rcnn.inference.export.metadata import metadata
from cpm_rcnn.inference.export.onnx_file import MIN_OPSET, OnnxRunner, check_onnx, write_onnx
from cpm_rcnn.inference.export.parity import Comparison, Runner, compare, drawn_images
from cpm_rcnn.inference.export.program import trace
from cpm_rcnn.inference.export.pt2_file import REPLACEMENTS, Pt2Runner, write_pt2
from cpm_rcnn.models.detector import TwoStageDetector

_RUNNERS: dict[str, Callable[[Path], Runner]] = {"onnx": OnnxRunner, "pt2": Pt2Runner}
FORMATS = tuple(_RUNNERS)


def export(
    detector: Detector,
    path: Path,
    format: str = "onnx",
    *,
    images: Mapping[str, Tensor] | None = None,
    opset: int = MIN_OPSET,
) -> Comparison:
    """Write a detector to ``path``. If there is an error, nothing is written.

    The file is written under a temporary name, read again, and run on ``images``. It gets its name if it gives the
    detections of the detector's model: the same labels, boxes within 0.05 pixels, and scores within 1e-4.

    Args:
        detector: its settings and its size of images are stored in the file.
        path: the file; an existing one is replaced.
        format: ``onnx``, or ``pt2`` for :func:`torch.export.load`.
        images: uint8 RGB images (3, H, W) of any size, by name; None draws shapes.
        opset: version of ONNX's operators; 19 or higher. Not used for ``pt2``.

    Raises:
        UserError: a package for the format is missing, the detector was converted to bfloat16 or tests with tiles or at
            several scales, the model cannot be exported, there are no detections to compare, or they differ.
    """
    check_choice("format", format, FORMATS)
    check_count("opset", opset, MIN_OPSET)
    if format == "onnx":
        check_onnx()
    if detector.multi_scale is not None:
        raise ArgumentError("multi_scale", ": a file tests at one scale; merge the detections of several outside")
    if detector.tile is not None:
        raise ArgumentError("tile", f"={detector.tile}: a file does not cut images into tiles; export with tile=null")
    if detector.model.inference_dtype is torch.bfloat16:
        raise UserError("the weights were converted to bfloat16, but a file has float32 weights; load the model again")
    model = copy.deepcopy(detector.model).cpu().eval()
    images = drawn_images(detector) if images is None else images
    resized = {name: detector.resize(image) for name, image in images.items()}
    # torch.export.save expects the suffix.
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.{format}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _quiet(), _without_garbage_collection():
            _write(model, temporary, format, metadata(detector), opset)
            run = _open(temporary, format, opset)
        comparison = compare(model, run, resized)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return comparison


def _write(model: TwoStageDetector, path: Path, format: str, about: str, opset: int) -> None:
    try:
        if format == "onnx":
            write_onnx(trace(model), path, about, opset)
        else:
            write_pt2(trace(model, REPLACEMENTS), path, about)
    except OSError:
        raise
    except Exception as error:  # the exporters raise errors of many kinds
        raise UserError(f"torch cannot export this model as format={format}: {_first_line(error)}") from error


def _open(path: Path, format: str, opset: int) -> Runner:
    try:
        return _RUNNERS[format](path)
    except OSError:
        raise
    except Exception as error:  # for example, onnxruntime does not have all operators of the newest opsets
        hint = f" with opset={opset}; try opset={MIN_OPSET}" if opset > MIN_OPSET else ""
        raise UserError(f"the file of format={format} cannot be run{hint}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages of the exporters that a user cannot act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Do not search for unreachable objects: tracers make millions that are in use, and the search takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
