"""One training under Lightning, and how it ends if it does not finish."""

import logging
import signal
import sys
from pathlib import Path
from typing import NoReturn

import pytorch_lightning as pl

from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting.sweep import RECORD
from cpm_rcnn.training.interruption import Interrupted, Interruption
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.training.process_watch import ProcessWatch
from cpm_rcnn.weights.resume import ResumePoint

_log = logging.getLogger(__name__)


def fit(
    trainer: pl.Trainer,
    module: DetectionModule,
    datamodule: CocoDataModule,
    resume_point: ResumePoint | None,
    run_dir: Path,
) -> None:
    """Train to the end.

    A signal saves a checkpoint, says how to resume, and ends the process with status 128 + signal.

    Args:
        trainer: the trainer of the run.
        module: the module to train.
        datamodule: the data.
        resume_point: where the run resumes; None for a new run.
        run_dir: the run's folder.

    Raises:
        UserError: another process of the run failed or does not answer.
    """
    path = None if resume_point is None else resume_point.path
    # A run with fast_dev_run saves nothing.
    interruption = next((each for each in trainer.callbacks if isinstance(each, Interruption)), None)  # type: ignore[attr-defined]
    if (run_dir / RECORD).exists():
        to_resume = f"to resume, run the sweep again in {run_dir.parent}"
    else:
        to_resume = f"to resume, run the same command with name={run_dir.name} resume=auto"
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True)
    except Interrupted as stop:
        _stop(trainer, f"stopped by {stop}; {to_resume}", stop.number, run_dir)
    except Exception as error:
        if interruption is not None and interruption.saved_step is not None:
            step = f"step {interruption.saved_step}"
            if interruption.received:
                # The signal has also ended a worker of a loader, or another process.
                name = signal.Signals(interruption.received).name
                _stop(trainer, f"stopped by {name} at {step}; {to_resume}", interruption.received, run_dir)
            if trainer.is_global_zero:
                _log.warning("the run is saved at %s; %s", step, to_resume)
        watch = next(each for each in trainer.callbacks if isinstance(each, ProcessWatch))  # type: ignore[attr-defined]
        if watch.message is None:
            raise
        if (launcher := trainer.strategy.launcher) is not None and hasattr(launcher, "kill"):
            launcher.kill(signal.SIGKILL)
        raise UserError(watch.message) from error


def _stop(trainer: pl.Trainer, message: str, number: int, run_dir: Path) -> NoReturn:
    """End this process after a signal."""
    if trainer.is_global_zero:
        print(message)
        print(run_dir)
    # One process per machine exits with the status: Lightning kills all processes of a machine once one has failed.
    sys.exit(128 + number if trainer.local_rank == 0 else 0)
