"""The folder of a training run, which may contain an earlier run of the same name."""

import shutil
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from cpm_rcnn.errors import UserError


def refuse_earlier_run(run_dir: Path) -> None:
    """Make sure that a new run does not mix with an earlier one.

    Only the first process checks, because the others may start later.

    Args:
        run_dir: the folder of the new run.

    Raises:
        UserError: the folder contains checkpoints or metrics.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return
    if any(run_dir.glob("checkpoints/*.ckpt")) or any(run_dir.glob("metrics*.csv")):
        raise UserError(
            f"name={run_dir.name}: {run_dir} already contains a run; resume=auto resumes it, overwrite=true replaces "
            "it, or give another name"
        )


def remove_checkpoints(run_dir: Path) -> None:
    """Remove the checkpoints of an earlier run; called when nothing of the new run can be refused any more."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
