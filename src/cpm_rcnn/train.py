"""``python -m cpm_rcnn.train``: train a model, evaluate its best checkpoint, leave pictures and tables."""

import subprocess
import sys
from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn import assembly
from cpm_rcnn.callbacks import Interrupted
from cpm_rcnn.cli.main import run
from cpm_rcnn.errors import UserError, check_count
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.curves import keep_metrics, plot_curves
from cpm_rcnn.reporting.tables import print_metrics, write_metrics
from cpm_rcnn.reporting.validation_sheet import validation_sheet
from cpm_rcnn.weights.resume import find_start, start_step


def train(config: DictConfig) -> None:
    """One training run into Hydra's output folder."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return train_apart(run_dir)
    use_deform_backend(config.ops.deform)
    check_count("sheet_images", config.sheet_images, 0)
    check_count("seed", config.seed, 0)
    if config.init is not None and config.resume not in (None, "auto"):
        raise UserError("init and resume: give one; a run that goes on has its weights already")
    start = find_start(config.resume, run_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = assembly.build_datamodule(config)
    module = assembly.build_module(config, datamodule, goes_on=start is not None)
    if start is not None:
        datamodule.start_step = start_step(start, module) * config.trainer.accumulate_grad_batches
    assembly.check_room(run_dir, module)
    trainer = assembly.build_trainer(config, run_dir)
    if trainer.is_global_zero:
        keep_metrics(run_dir, goes_on=start is not None)
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
    except Interrupted as stop:
        if trainer.is_global_zero:
            print(f"stopped by {stop}; the same command with name={run_dir.name} resume=auto goes on")
            print(run_dir)
        # One process a machine tells of it: Lightning kills the others of a machine, and this one, once any has failed.
        sys.exit(128 + stop.number if trainer.local_rank == 0 else 0)
    # A rehearsal (fast_dev_run) leaves no checkpoint to go back to.
    best = None if config.trainer.fast_dev_run else best_or_last(run_dir)
    # The first process's: where the name of the run is the time, those of other machines may have other folders.
    best = trainer.strategy.broadcast(best)
    trainer.validate(module, datamodule=datamodule, ckpt_path=best, verbose=False, weights_only=True)
    if not trainer.is_global_zero:
        return
    write_metrics(module.metrics, run_dir / "metrics.json")
    if not config.trainer.fast_dev_run:
        plot_curves(run_dir / "metrics.csv", run_dir)
    if config.sheet_images:
        validation_sheet(
            # Lightning has moved it back to the CPU.
            module.to(trainer.strategy.root_device).eval(),
            datamodule.val_dataloader().dataset,
            module.class_names,
            run_dir / "validation.png",
            config.sheet_images,
            module.device,
        )
    print_metrics(module.metrics)
    print(run_dir)


def best_or_last(run_dir: Path) -> Path:
    """The checkpoint to judge a run by: the best, or the last of a run that was stopped before it knew a best."""
    best = run_dir / "checkpoints" / "best.ckpt"
    return best if best.exists() else best.with_name("last.ckpt")


def train_apart(run_dir: Path) -> None:
    """A job of a multirun, as a command of its own: no process group, logger or device memory is left to the next.

    Raises:
        UserError: the job failed; it has said why.
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
