"""The checkpoint from which a stopped run resumes."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpm_rcnn.errors import UserError, check_choice, shown
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.remote.files import local_file
from cpm_rcnn.remote.urls import without_secrets
from cpm_rcnn.weights.checkpoints import check_checkpoint, stored_settings
from cpm_rcnn.weights.reading import read_file

_log = logging.getLogger(__name__)
# Options without which the state of the optimizer or the position in the run have no meaning.
_FIXED = ("schedule.optimizer", "trainer.accumulate_grad_batches", "backbone.frozen_stages")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from.

    Attributes:
        path: the file, which is a local copy if it is remote.
        checkpoint: its content, so that the file is read only once.
        source: the argument and its value, for messages.
    """

    path: Path
    checkpoint: dict[str, Any]
    source: str

    @property
    def step(self) -> int:
        """The number of optimizer steps of the run so far."""
        return self.checkpoint["global_step"]

    @property
    def settings(self) -> ModelSettings:
        """The model settings of the run."""
        return stored_settings(self.checkpoint, self.source)


def find_resume_point(resume: str | bool | None, run_dir: Path) -> ResumePoint | None:
    """The checkpoint to resume from, or None to start at step 0.

    Args:
        resume: None or False; ``auto`` or True (the newest intact checkpoint of the run's folder, if there is one); or
            a file, by its path or URL.
        run_dir: the run's folder.

    Raises:
        UserError: the file does not exist, is damaged, or contains weights but no training state.
        UnavailableError: the server of a remote file refuses or does not answer.
    """
    if resume is None or resume is False:
        return None
    if resume not in ("auto", True):
        return _read(local_file("resume", resume), without_secrets(f"resume={resume}"))
    for path in sorted((run_dir / "checkpoints").glob("*.ckpt"), key=_newest_first):
        try:
            return _read(path, f"resume={path}")
        except UserError as error:
            _log.warning("%s; skipped", error)
    _log.warning("resume=auto: no checkpoint in %s yet, starting at step 0", run_dir)
    return None


def checkpoint_step(path: Path) -> int:
    """The step of an intact checkpoint, without reading its tensors."""
    return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])


def check_same_run(point: ResumePoint, settings: ModelSettings, categories: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`UserError` unless a run with this model and these classes can resume from ``point``."""
    check_same_model(point.checkpoint, settings, point.source)
    if point.checkpoint["hyper_parameters"]["categories"] != list(categories):
        raise UserError(f"{point.source}: its classes differ from those of the training data")


def check_same_model(checkpoint: Mapping[str, Any], settings: ModelSettings, source: str) -> None:
    """Raise :class:`UserError` unless a checkpoint's weights can be used in a model with ``settings``.

    Args:
        checkpoint: content of a checkpoint of ``train`` or ``convert``.
        settings: settings of the model to load into. Those with the role training or inference may differ.
        source: the argument and file, for messages.
    """
    theirs, ours = stored_settings(checkpoint, source).architecture(), settings.architecture()
    differences = [
        f"{key} is {shown(theirs.get(key))} in the checkpoint and {shown(ours.get(key))} in this model"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise UserError(f"{source}: is a checkpoint of another model; {'; '.join(differences)}")


def check_recipe(point: ResumePoint, recipe: Mapping[str, Any], changes: str) -> list[str]:
    """Compare what decides the weights of the run with what the checkpoint was trained with.

    Options that only one of them has, because another version wrote the checkpoint, are not compared.

    Args:
        point: the checkpoint.
        recipe: options of the run as plain values by name.
        changes: ``refuse``, or ``allow`` to continue with the options of the run.

    Returns:
        Names of the options that change.

    Raises:
        UserError: an option differs and changes are refused, or it cannot change in a run that resumes.
    """
    check_choice("resume_changes", changes, ("refuse", "allow"))
    arguments = point.checkpoint["hyper_parameters"]
    stored = arguments.get("recipe") or {f"schedule.{name}": value for name, value in arguments["schedule"].items()}
    changed = [name for name in recipe if name in stored and stored[name] != recipe[name]]
    fixed = [name for name in changed if name in _FIXED]
    values = "; ".join(
        f"{name} is {shown(stored[name])} there and {shown(recipe[name])} here" for name in fixed or changed
    )
    if fixed:
        raise UserError(f"{point.source}: {values}; a run that resumes cannot change this: start from it with init=")
    if changed and changes == "refuse":
        raise UserError(f"{point.source}: {values}; resume_changes=allow continues with the values here")
    if changed:
        _log.warning("%s: %s; the values here are used from step %d", point.source, values, point.step)
    return changed


def _read(path: Path, source: str) -> ResumePoint:
    checkpoint = read_file(path, "resume")
    check_checkpoint(checkpoint, source)
    if "optimizer_states" not in checkpoint:
        file = source.removeprefix("resume=")
        raise UserError(f"{source}: contains weights, but no training state; start from it with init={file}")
    return ResumePoint(path, checkpoint, source)


def _newest_first(path: Path) -> tuple[int, bool]:
    """A sort key that reads the step of a checkpoint without its tensors. Damaged files come first and are reported."""
    try:
        return -checkpoint_step(path), path.name != "last.ckpt"
    except Exception:  # reported when the file is read
        return -sys.maxsize, path.name != "last.ckpt"
