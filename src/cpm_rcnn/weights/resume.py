"""Where a run that was stopped goes on."""

import logging
from pathlib import Path

from cpm_rcnn.errors import UserError, check_file
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.weights.checkpoints import read_checkpoint
from cpm_rcnn.weights.initialize import check_same_model

_log = logging.getLogger(__name__)


def find_start(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to go on from, or None to start anew.

    Args:
        resume: None, ``auto`` (the newest whole checkpoint of the run's folder, if there is one), or a file.
        run_dir: the run's folder.

    Raises:
        UserError: no such file.
    """
    if resume is None:
        return None
    if resume != "auto":
        return check_file("resume", resume)
    steps = {}
    for path in sorted((run_dir / "checkpoints").glob("*.ckpt")):
        try:
            checkpoint = read_checkpoint(path, "resume")
        except UserError as error:
            _log.warning("%s; passed over", error)
            continue
        if "optimizer_states" in checkpoint:
            steps[path] = checkpoint["global_step"]
    newest = max(steps, key=lambda path: (steps[path], path.name == "last.ckpt"), default=None)
    if newest is None:
        _log.warning("resume=auto: no checkpoint in %s yet, starting at step 0", run_dir)
    return newest


def start_step(path: Path, module: DetectionModule) -> int:
    """The step that ``path`` was saved at.

    Raises:
        UserError: it holds weights but no run; or it is of another model or of other classes.
    """
    checkpoint = read_checkpoint(path, "resume")
    if "optimizer_states" not in checkpoint:
        raise UserError(f"resume={path}: holds weights, but no run to go on with; start from it with init=")
    check_same_model(checkpoint, module, f"resume={path}")
    if checkpoint["hyper_parameters"]["categories"] != module.hparams["categories"]:
        raise UserError(f"resume={path}: of other classes than those of data.train_json")
    return checkpoint["global_step"]
