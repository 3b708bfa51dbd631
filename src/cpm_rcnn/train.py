"""``python -m cpm_rcnn.train``: train a model, evaluate its best checkpoint, write plots and tables."""

import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.cli.assembly import build_datamodule, build_module
from cpm_rcnn.cli.config import as_path, config_keys
from cpm_rcnn.cli.main import run
from cpm_rcnn.cli.recipe import training_recipe
from cpm_rcnn.cli.run_folder import refuse_earlier_run, remove_checkpoints
from cpm_rcnn.cli.trainer import build_trainer, check_disk_space, checkpoint_size
from cpm_rcnn.cli.trainer_options import lightning_errors
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.errors import UserError, check_choice, check_count, check_flag
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.curves import keep_metrics, plot_curves
from cpm_rcnn.reporting.tables import print_metrics, write_metrics
from cpm_rcnn.reporting.validation_sheet import validation_sheet
from cpm_rcnn.training.interruption import Interrupted, Interruption
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.training.process_watch import ProcessWatch
from cpm_rcnn.weights.initialize import initialize
from cpm_rcnn.weights.resume import ResumePoint, check_recipe, check_same_run, checkpoint_step, find_resume_point

_log = logging.getLogger(__name__)


def train(config: DictConfig) -> None:
    """Run one training; its results are written to Hydra's output folder."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _run_in_subprocess(run_dir)
    use_deform_backend(config.ops.deform)
    check_count("sheet_images", config.sheet_images, 0)
    check_count("seed", config.seed, 0, 2**32 - 1)
    check_flag("overwrite", config.overwrite)
    if config.init is not None and config.resume not in (None, False, "auto", True):
        raise UserError("init and resume: give only one of them; a resumed run has its weights already")
    check_choice("resume_changes", config.resume_changes, ("refuse", "allow"))
    if config.resume in (None, False) and not config.overwrite:
        refuse_earlier_run(run_dir)
    resume_point = find_resume_point(as_path(config.resume), run_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = build_datamodule(config)
    module = build_module(config, datamodule)
    if resume_point is None:
        initialize(module.model, module.detector.class_names, init=as_path(config.init))
    else:
        check_same_run(resume_point, module.model.settings, module.detector.categories)
        datamodule.start_step = resume_point.step * config.trainer.accumulate_grad_batches
    size = checkpoint_size(module)
    check_disk_space(run_dir, size)
    trainer = build_trainer(config, run_dir, resume_point, size)
    module.hparams["recipe"] = training_recipe(config, module, datamodule, trainer.world_size)
    if resume_point is not None:
        check_recipe(resume_point, module.hparams["recipe"], config.resume_changes)
        module.schedule_counts = True
    if trainer.is_global_zero:
        if resume_point is None:
            remove_checkpoints(run_dir)
        keep_metrics(run_dir, resuming=resume_point is not None)
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    with config_keys(config, "data"), lightning_errors(config):
        _fit(trainer, module, datamodule, resume_point, run_dir)
    # A run with fast_dev_run leaves no checkpoint.
    best = None if config.trainer.fast_dev_run else _best_or_last(run_dir)
    # Only the first process is sure to have the file.
    evaluated = False
    if trainer.is_global_zero and best is not None:
        evaluated = module.evaluated_step == trainer.global_step == checkpoint_step(best)
    # Without name=, the folder is named by the time, which can differ between machines: take the first process's.
    best, evaluated = trainer.strategy.broadcast((best, evaluated))
    if not evaluated:
        trainer.validate(module, datamodule=datamodule, ckpt_path=best, verbose=False, weights_only=True)
    if trainer.is_global_zero:
        _report(config, trainer, module, datamodule, run_dir)


def _fit(
    trainer: pl.Trainer,
    module: DetectionModule,
    datamodule: CocoDataModule,
    resume_point: ResumePoint | None,
    run_dir: Path,
) -> None:
    path = None if resume_point is None else resume_point.path
    # A run with fast_dev_run saves nothing.
    interruption = next((each for each in trainer.callbacks if isinstance(each, Interruption)), None)  # type: ignore[attr-defined]
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


def _report(
    config: DictConfig, trainer: pl.Trainer, module: DetectionModule, datamodule: CocoDataModule, run_dir: Path
) -> None:
    write_metrics(module.metrics, run_dir / "metrics.json")
    if not config.trainer.fast_dev_run and (run_dir / "metrics.csv").exists():
        plot_curves(run_dir / "metrics.csv", run_dir)
    if config.sheet_images:
        # Lightning has moved the model back to the CPU.
        detector = module.detector.to(trainer.strategy.root_device)
        dataset = datamodule.val_dataloader().dataset
        validation_sheet(detector, dataset, run_dir / "validation.png", config.sheet_images)
    print_metrics(module.metrics)
    print(run_dir)


def _best_or_last(run_dir: Path) -> Path:
    """The checkpoint for the final metrics: the best, or the last if there is no best checkpoint."""
    best = run_dir / "checkpoints" / "best.ckpt"
    return best if best.exists() else best.with_name("last.ckpt")


def _run_in_subprocess(run_dir: Path) -> None:
    """Run a job of a multirun in its own process, so that no process group, logger or memory remains after it.

    Raises:
        UserError: the job failed; it has printed the reason.
    """
    overrides = HydraConfig.get().overrides.task
    job = [sys.executable, "-m", "cpm_rcnn.train", *overrides, f"hydra.run.dir='{run_dir}'"]
    if subprocess.run(job).returncode:
        raise UserError(f"the job with {' '.join(overrides)} failed, see above")


def main() -> None:
    run(train, "train")


if __name__ == "__main__":
    main()
