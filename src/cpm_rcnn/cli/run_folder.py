"""The folder of a training run."""

import shutil
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from cpm_rcnn.errors import UserError


def clear_run_folder(run_dir: Path, *, overwrite: bool) -> None:
    """Make sure that a new run does not mix with an earlier run of the same name.

    Only the first process checks, because the others may start later.

    Args:
        run_dir: the folder of the new run.
        overwrite: whether an earlier run is removed.

    Raises:
        UserError: there is an earlier run, and ``overwrite`` is False.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return
    checkpoints, metrics = run_dir / "checkpoints", list(run_dir.glob("metrics*.csv"))
    if not metrics and not any(checkpoints.glob("*.ckpt")):
        return
    if not overwrite:
        raise UserError(
            f"name={run_dir.name}: {run_dir} already contains a run; resume=auto resumes it, overwrite=true replaces "
            "it, or give another name"
        )
    shutil.rmtree(checkpoints, ignore_errors=True)
    for path in metrics:
        path.unlink()
