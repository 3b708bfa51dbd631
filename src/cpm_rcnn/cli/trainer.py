"""From a config to Lightning's Trainer."""

import shutil
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint

from cpm_rcnn.cli.instantiate import instantiate_allowed
from cpm_rcnn.errors import UserError, check_count
from cpm_rcnn.training.checkpoint_io import AtomicCheckpointIO
from cpm_rcnn.training.interruption import EvaluationSignals, Interruption
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.training.nonfinite import NonFiniteGuard
from cpm_rcnn.training.progress import LossProgressBar
from cpm_rcnn.training.step_seed import StepSeed
from cpm_rcnn.training.throughput import Throughput
from cpm_rcnn.training.tolerant_logger import TolerantLogger
from cpm_rcnn.weights.resume import ResumePoint


def build_trainer(config: DictConfig, run_dir: Path, resume_point: ResumePoint | None = None) -> pl.Trainer:
    """The Trainer of a training run; it writes checkpoints and logs under ``run_dir``.

    Args:
        config: of ``train``.
        run_dir: the run's folder.
        resume_point: the checkpoint that the run resumes from; it is not read again.

    Raises:
        UserError: a value is invalid.
    """
    if config.trainer.limit_val_batches == 0:
        raise UserError(
            "trainer.limit_val_batches=0: the best checkpoint is chosen by validation; null means all batches"
        )
    steps = config.schedule.max_steps
    callbacks: list[Callback] = [
        LossProgressBar(refresh_rate=config.trainer.log_every_n_steps),
        Throughput(),
        StepSeed(config.seed),
        NonFiniteGuard(config.on_nonfinite, run_dir),
        EvaluationSignals(),
    ]
    if not config.trainer.fast_dev_run:
        folder = run_dir / "checkpoints"
        check_count("checkpoint_interval", config.checkpoint_interval)
        interval = config.checkpoint_interval
        callbacks += [
            ModelCheckpoint(folder, filename="best", monitor="val/AP", mode="max", enable_version_counter=False),
            # Without a monitor it is written after every validation; ``save_last`` would follow a new best only.
            ModelCheckpoint(folder, filename="last", enable_version_counter=False),
            ModelCheckpoint(folder, filename="last", every_n_train_steps=interval, enable_version_counter=False),
            Interruption(folder / "last.ckpt"),
        ]
        if config.logger:
            callbacks.append(LearningRateMonitor("step"))
    return instantiate_allowed(
        config.trainer,
        max_steps=steps,
        max_epochs=-1,
        # Lightning counts batches here.
        val_check_interval=min(config.schedule.val_interval, steps) * config.trainer.accumulate_grad_batches,
        callbacks=callbacks,
        logger=[
            TolerantLogger(instantiate_allowed(logger, save_dir=str(run_dir))) for logger in config.logger.values()
        ],
        plugins=[AtomicCheckpointIO(resume_point)],
        default_root_dir=str(run_dir),
        # The data module distributes the samples itself: its order is a function of step and rank.
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def build_evaluator(config: DictConfig, run_dir: Path) -> pl.Trainer:
    """The Trainer of an evaluation; it writes neither logs nor checkpoints."""
    return instantiate_allowed(
        config.trainer,
        callbacks=[LossProgressBar(refresh_rate=config.trainer.log_every_n_steps), EvaluationSignals()],
        logger=False,
        enable_checkpointing=False,
        default_root_dir=str(run_dir),
        use_distributed_sampler=False,
        enable_model_summary=False,
    )


def check_disk_space(run_dir: Path, module: DetectionModule) -> None:
    """Refuse to start a run whose checkpoints will not fit on its disk.

    Raises:
        UserError: free space is less than the best checkpoint, the last one, and one that is being written.
    """
    weights = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    per_weight = 3 if module.schedule.optimizer == "adamw" else 2  # the weight and the optimizer's state of it
    needed, free = 3 * per_weight * weights, shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"{run_dir}: {free / 1e9:.2f} GB are free, but the run's checkpoints take {needed / 1e9:.2f} GB"
        )
