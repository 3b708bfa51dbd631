"""An exponential moving average of the weights, which is what validations, checkpoints and the final model use."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


class MovingAverage(WeightAveraging):
    """Lightning's averaging of weights, with a decay that grows, and checkpoints that are right during validations too.

    A checkpoint has the average as its ``state_dict``, and the weights that training continues with as
    ``current_model_state``.

    Args:
        decay: part of the average that remains at each step, 0 to 1. After n steps it is at most (1 + n) / (10 + n), so
            that the first weights are soon forgotten.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
            kept = min(decay, (1 + int(steps)) / (10 + int(steps)))
            return averaged + (1 - kept) * (current - averaged)

        # The buffers of the model do not change.
        super().__init__(use_buffers=False, avg_fn=average)
        self._swapped = False

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue with the weights."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._swapped = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store both; a run that a signal stops in a validation saves when they are swapped."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            average = checkpoint["current_model_state"]
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = average
