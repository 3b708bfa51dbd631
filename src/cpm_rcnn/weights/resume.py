"""The checkpoint from which a stopped run resumes."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpm_rcnn.errors import UserError, check_path
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.weights.checkpoints import read_checkpoint
from cpm_rcnn.weights.initialize import check_same_model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from.

    Attributes:
        path: the file.
        checkpoint: its content, so that nothing reads the file again.
    """

    path: Path
    checkpoint: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps of the run so far."""
        return self.checkpoint["global_step"]


def find_resume_point(resume: str | bool | None, run_dir: Path) -> ResumePoint | None:
    """The checkpoint to resume from, or None to start at step 0.

    Args:
        resume: None or False; ``auto`` or True (the newest intact checkpoint of the run's folder, if there is one); or a
            file.
        run_dir: the run's folder.

    Raises:
        UserError: no such file, a damaged one, or one that contains weights but no training state.
    """
    if resume is None or resume is False:
        return None
    if resume not in ("auto", True):
        return _read(check_path("resume", resume))
    for path in sorted((run_dir / "checkpoints").glob("*.ckpt"), key=_newest_first):
        try:
            return _read(path)
        except UserError as error:
            _log.warning("%s; skipped", error)
    _log.warning("resume=auto: no checkpoint in %s yet, starting at step 0", run_dir)
    return None


def check_same_run(point: ResumePoint, settings: ModelSettings, categories: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`UserError` unless a run with this model and these classes can resume from ``point``."""
    check_same_model(point.checkpoint, settings, f"resume={point.path}")
    if point.checkpoint["hyper_parameters"]["categories"] != list(categories):
        raise UserError(f"resume={point.path}: its classes differ from those of the training data")


def _read(path: Path) -> ResumePoint:
    checkpoint = read_checkpoint(path, "resume")
    if "optimizer_states" not in checkpoint:
        raise UserError(f"resume={path}: holds weights, but no training state; start from it with init={path}")
    return ResumePoint(path, checkpoint)


def _newest_first(path: Path) -> tuple[int, bool]:
    """A sort key that reads the step of a checkpoint without its tensors. Damaged files come first and are reported."""
    try:
        step = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"]
        return -int(step), path.name != "last.ckpt"
    except Exception:  # reported when the file is read
        return -sys.maxsize, path.name != "last.ckpt"
