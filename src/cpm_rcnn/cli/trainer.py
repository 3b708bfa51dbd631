"""Construction of Lightning's Trainer from a config."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer

from cpm_rcnn.cli.config import config_keys
from cpm_rcnn.cli.instantiate import instantiate_allowed
from cpm_rcnn.cli.lightning import check_trainer, lightning_errors
from cpm_rcnn.errors import ArgumentError, UserError, check_count, check_range, shown
from cpm_rcnn.training.averaging import MovingAverage
from cpm_rcnn.training.checkpoint_io import AtomicCheckpointIO
from cpm_rcnn.training.interruption import EvaluationSignals, Interruption
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.training.nonfinite import NonFiniteGuard
from cpm_rcnn.training.process_watch import ProcessWatch
from cpm_rcnn.training.progress import LossProgressBar
from cpm_rcnn.training.run_log import RunLog
from cpm_rcnn.training.step_seed import StepSeed
from cpm_rcnn.training.throughput import Throughput
from cpm_rcnn.training.tolerant_logger import TolerantLogger
from cpm_rcnn.weights.resume import ResumePoint


def build_trainer(
    config: DictConfig, run_dir: Path, resume_point: ResumePoint | None = None, checkpoint_size: int = 0
) -> pl.Trainer:
    """The Trainer of a training run; it writes checkpoints and logs under ``run_dir``.

    Args:
        config: the config of ``train``.
        run_dir: the run's folder.
        resume_point: the checkpoint that the run resumes from; it is not read again.
        checkpoint_size: bytes of disk space to reserve for the checkpoint that a failing run writes.

    Raises:
        UserError: a value is invalid.
    """
    check_trainer(config)
    check_range("process_timeout", config.process_timeout, 1)
    steps = config.schedule.max_steps
    watch = ProcessWatch(config.process_timeout)
    callbacks: list[Callback] = [
        watch,
        LossProgressBar(config.trainer.log_every_n_steps),
        Throughput(),
        StepSeed(config.seed),
        NonFiniteGuard(config.on_nonfinite, run_dir),
        EvaluationSignals(),
        RunLog(),
        Timer(),  # its time is stored in checkpoints
    ]
    if config.early_stopping is not None:
        check_count("early_stopping", config.early_stopping)
        callbacks.append(EarlyStopping("val/AP", mode="max", patience=config.early_stopping))
    if not config.trainer.fast_dev_run:
        folder = run_dir / "checkpoints"
        check_count("checkpoint_interval", config.checkpoint_interval)
        interval = config.checkpoint_interval
        # After validations; Lightning takes a validation at every step (an interval of 1) for one per epoch (1.0).
        options: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": False}
        callbacks += [
            ModelCheckpoint(folder, filename="best", monitor="val/AP", mode="max", **options),
            # Without a monitor it is written after every validation; ``save_last`` would follow a new best only.
            ModelCheckpoint(folder, filename="last", **options),
            ModelCheckpoint(folder, filename="last", every_n_train_steps=interval, **options),
        ]
        if config.logger:
            callbacks.append(LearningRateMonitor("step"))
        # Before all that can fail.
        callbacks.insert(0, Interruption(folder / "last.ckpt", reserve=checkpoint_size))
    if config.ema is not None:
        check_range("ema", config.ema, 0, 1)
        # Before the interruption, which saves the average of the last step.
        callbacks.insert(0, MovingAverage(config.ema))
    loggers = [TolerantLogger(logger) for logger in _loggers(config, run_dir)]
    with config_keys(config, "trainer"), lightning_errors(config):
        trainer = instantiate_allowed(
            _lightning_arguments(config),
            "pytorch_lightning.Trainer",
            max_steps=steps,
            max_epochs=-1,
            # Lightning counts this interval in batches, not in optimizer steps.
            val_check_interval=min(config.schedule.val_interval, steps) * config.trainer.accumulate_grad_batches,
            callbacks=callbacks,
            logger=loggers,
            plugins=[AtomicCheckpointIO(resume_point)],
            default_root_dir=str(run_dir),
            # The data module distributes the samples itself: its order is a function of step and rank.
            use_distributed_sampler=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    watch.attach(trainer)
    return trainer


def _lightning_arguments(config: DictConfig) -> DictConfig:
    """The options of ``trainer`` without ours."""
    node = config.trainer.copy()
    OmegaConf.set_struct(node, False)
    node.pop("compile")
    return node


def _loggers(config: DictConfig, run_dir: Path) -> Iterator[Any]:
    for name, node in config.logger.items():
        if not OmegaConf.is_dict(node):
            raise UserError(f"logger.{name}={shown(node)}: must be a mapping with _target_; logger=none logs nothing")
        try:
            yield instantiate_allowed(node, "pytorch_lightning.loggers.", save_dir=str(run_dir))
        except ArgumentError as error:
            raise UserError(f"logger.{name}.{error}") from None
        except InstantiationException as error:
            if not isinstance(error.__cause__, (TypeError, ValueError, ImportError)):
                raise
            raise UserError(f"logger.{name}: {error.__cause__}") from error


def build_evaluator(config: DictConfig, run_dir: Path) -> pl.Trainer:
    """The Trainer of an evaluation; it writes neither logs nor checkpoints.

    Raises:
        UserError: a value is invalid; or ``trainer.precision`` or ``trainer.compile`` is set, which are options of a
            training (that of an evaluation is ``precision``).
    """
    check_trainer(config)
    if config.trainer.precision not in ("32-true", 32):
        raise UserError(f"trainer.precision={shown(config.trainer.precision)}: only in train; eval has precision=bf16")
    if config.trainer.compile != "off":
        raise UserError(f"trainer.compile={shown(config.trainer.compile)}: only in train")
    with config_keys(config, "trainer"), lightning_errors(config):
        return instantiate_allowed(
            _lightning_arguments(config),
            "pytorch_lightning.Trainer",
            callbacks=[LossProgressBar(config.trainer.log_every_n_steps), EvaluationSignals()],
            logger=False,
            enable_checkpointing=False,
            default_root_dir=str(run_dir),
            use_distributed_sampler=False,
            enable_model_summary=False,
        )


def checkpoint_size(module: DetectionModule, averaged: bool = False) -> int:
    """Bytes of a checkpoint of a run, approximately, and not less; ``averaged``: with an average of the weights."""
    weights = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    per_weight = 3 if module.schedule.optimizer == "adamw" else 2  # the weight and the optimizer's state of it
    return int(1.02 * (per_weight + averaged) * weights) + 2**20


def check_disk_space(run_dir: Path, size: int) -> None:
    """Refuse to start a run whose checkpoints will not fit on its disk.

    Args:
        run_dir: the run's folder.
        size: bytes of one checkpoint.

    Raises:
        UserError: free space is less than the best checkpoint, the last one, one that is being written, and the space
            reserved for the checkpoint of a failing run.
    """
    needed, free = 4 * size, shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            f"{run_dir}: {free / 1e9:.2f} GB are free, but the run's checkpoints take {needed / 1e9:.2f} GB"
        )
