"""``python -m cpm_rcnn.train``: train a model, evaluate its best checkpoint, leave pictures and tables."""

import subprocess
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn import assembly
from cpm_rcnn.checkpoints import read_checkpoint
from cpm_rcnn.commands import run
from cpm_rcnn.errors import UserError, check_count
from cpm_rcnn.ops import use_deform_backend
from cpm_rcnn.reporting.curves import plot_curves
from cpm_rcnn.reporting.tables import print_metrics, write_metrics
from cpm_rcnn.reporting.validation_sheet import validation_sheet


def train(config: DictConfig) -> None:
    """One training run into Hydra's output folder."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return train_apart(run_dir)
    use_deform_backend(config.ops.deform)
    check_count("sheet_images", config.sheet_images, 0)
    check_count("seed", config.seed, 0)
    if config.init is not None and config.resume is not None:
        raise UserError("init and resume: give one; a run that goes on has its weights already")
    pl.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = assembly.build_datamodule(config)
    module = assembly.build_module(config, datamodule)
    trainer = assembly.build_trainer(config, run_dir)
    # The same weights on every process, but not the same random RoIs.
    torch.manual_seed(config.seed + trainer.global_rank)
    if trainer.is_global_zero:
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    if config.resume is not None:
        checkpoint = read_checkpoint(config.resume, "resume")
        if "optimizer_states" not in checkpoint:
            raise UserError(
                f"resume={config.resume}: holds weights, but no run to go on with; start from it with init="
            )
        datamodule.start_step = checkpoint["global_step"] * config.trainer.accumulate_grad_batches
    trainer.fit(module, datamodule=datamodule, ckpt_path=config.resume, weights_only=True)
    # A rehearsal (fast_dev_run) leaves no checkpoint to go back to.
    best = None if config.trainer.fast_dev_run else run_dir / "checkpoints" / "best.ckpt"
    trainer.validate(module, datamodule=datamodule, ckpt_path=best, verbose=False, weights_only=True)
    if not trainer.is_global_zero:
        return
    write_metrics(module.figures, run_dir / "metrics.json")
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
    print_metrics(module.figures)
    print(run_dir)


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
