"""The course of a run in a few lines of its log file."""

import logging
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn

_log = logging.getLogger(__name__)


class RunLog(Callback):
    """Logs the start of a training, the result of every validation, and the end."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Where the run starts, and on what."""
        if trainer.is_global_zero:
            parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
            device = trainer.strategy.root_device.type
            _log.info(
                "training from step %d to %d: %.2f million parameters, %d %s on %s",
                *(trainer.global_step, trainer.max_steps, parameters / 1e6),
                *(trainer.world_size, "process" if trainer.world_size == 1 else "processes", device),
            )

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The loss of the last step, and the average precision."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero:
            _log.info("step %d: %s", trainer.global_step, _values(trainer.callback_metrics))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The last step."""
        if trainer.is_global_zero:
            _log.info("training ended at step %d", trainer.global_step)


def _values(metrics: dict[str, Any]) -> str:
    shown = [name for name in ("train/loss", "val/AP", "val/AP50", "val/AP75") if name in metrics]
    return ", ".join(f"{name} {float(metrics[name]):.4f}" for name in shown)
