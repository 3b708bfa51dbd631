"""``python -m cpm_rcnn.train``: train a model, evaluate its best checkpoint, write pictures and tables."""

import subprocess
import sys
from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.cli.assembly import build_datamodule, build_module
from cpm_rcnn.cli.config import config_keys
from cpm_rcnn.cli.main import run
from cpm_rcnn.cli.run_folder import clear_run_folder
from cpm_rcnn.cli.trainer import build_trainer, check_disk_space
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.errors import UserError, check_count, check_flag
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.curves import keep_metrics, plot_curves
from cpm_rcnn.reporting.tables import print_metrics, write_metrics
from cpm_rcnn.reporting.validation_sheet import validation_sheet
from cpm_rcnn.training.interruption import Interrupted
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.weights.initialize import initialize
from cpm_rcnn.weights.resume import ResumePoint, check_same_run, find_resume_point


def train(config: DictConfig) -> None:
    """One training run into Hydra's output folder."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _run_in_subprocess(run_dir)
    use_deform_backend(config.ops.deform)
    check_count("sheet_images", config.sheet_images, 0)
    check_count("seed", config.seed, 0)
    check_flag("overwrite", config.overwrite)
    if config.init is not None and config.resume not in (None, False, "auto", True):
        raise UserError("init and resume: give only one of them; a resumed run has its weights already")
    if config.resume in (None, False):
        clear_run_folder(run_dir, overwrite=config.overwrite)
    resume_point = find_resume_point(config.resume, run_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = build_datamodule(config)
    module = build_module(config, datamodule)
    if resume_point is None:
        initialize(module.model, module.detector.class_names, init=config.init)
    else:
        check_same_run(resume_point, module.model.settings, module.detector.categories)
        datamodule.start_step = resume_point.step * config.trainer.accumulate_grad_batches
    check_disk_space(run_dir, module)
    trainer = build_trainer(config, run_dir, resume_point)
    if trainer.is_global_zero:
        keep_metrics(run_dir, resuming=resume_point is not None)
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    with config_keys(config, "data"):
        _fit(trainer, module, datamodule, resume_point, run_dir)
    # A run with fast_dev_run leaves no checkpoint.
    best = None if config.trainer.fast_dev_run else _best_or_last(run_dir)
    # Without name=, the folder is named by the time, which can differ between machines: take the first process's.
    best = trainer.strategy.broadcast(best)
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
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True)
    except Interrupted as stop:
        if trainer.is_global_zero:
            print(f"stopped by {stop}; to resume, run the same command with name={run_dir.name} resume=auto")
            print(run_dir)
        # One process per machine exits with the status: Lightning kills all processes of a machine once one has failed.
        sys.exit(128 + stop.number if trainer.local_rank == 0 else 0)


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
    """The checkpoint that the final metrics are of: the best, or the last if no validation has chosen a best."""
    best = run_dir / "checkpoints" / "best.ckpt"
    return best if best.exists() else best.with_name("last.ckpt")


def _run_in_subprocess(run_dir: Path) -> None:
    """Run a job of a multirun as a command of its own, so that no process group, logger or memory outlives it.

    Raises:
        UserError: the job failed; it has printed why.
    """
    overrides = HydraConfig.get().overrides.task
    job = [sys.executable, "-m", "cpm_rcnn.train", *overrides, f"hydra.run.dir='{run_dir}'"]
    if subprocess.run(job).returncode:
        raise UserError(f"the job with {' '.join(overrides)} failed, see above")


def main() -> None:
    """The command."""
    run(train, "train")


if __name__ == "__main__":
    main()
