"""The progress bar, with steps, speed, remaining time, and every loss under a short name."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

# Seconds between refreshes on a terminal, and in a file to which the output is redirected.
_REFRESH_TERMINAL, _REFRESH_FILE = 0.5, 30.0


class LossProgressBar(TQDMProgressBar):
    """Lightning's bar with every loss as of the last logged step.

    It is refreshed by time. Values are read every ``log_every_n_steps`` steps only, because reading one waits for the
    device.

    Args:
        log_every_n_steps: training steps between updates of the losses.
    """

    def __init__(self, log_every_n_steps: int = 20) -> None:
        super().__init__(refresh_rate=1)
        self._read_every = max(1, log_every_n_steps)
        self._refresh_every = _REFRESH_TERMINAL if sys.stdout.isatty() else _REFRESH_FILE
        self._refreshed = float("-inf")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step, and the losses if they are due."""
        bar, done = self.train_progress_bar, batch_idx + 1
        if done % self._read_every == 0 or done == bar.total:
            self._refreshed = time.monotonic()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif not bar.disable and self._is_due():
            bar.n = done
            bar.refresh()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the batch."""
        if self._is_due() or batch_idx + 1 == self.val_progress_bar.total:
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The values on the right of the bar."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        shown = {name.removeprefix("train/"): value for name, value in items.items()}
        for name, value in trainer.logged_metrics.items():
            if name.startswith("train/loss_"):
                shown[name.removeprefix("train/loss_").removeprefix("rpn_")] = f"{float(value):.3f}"
        return shown

    def _is_due(self) -> bool:
        """Whether it is time to refresh; if so, the time starts again."""
        now = time.monotonic()
        if now - self._refreshed < self._refresh_every:
            return False
        self._refreshed = now
        return True
