"""The progress bar, with steps, speed, remaining time, and every loss under a short name."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar


class LossProgressBar(TQDMProgressBar):
    """Lightning's progress bar, which also shows every loss of the last logged step."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The values on the right of the bar."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        shown = {name.removeprefix("train/"): value for name, value in items.items()}
        for name, value in trainer.logged_metrics.items():
            if name.startswith("train/loss_"):
                shown[name.removeprefix("train/loss_").removeprefix("rpn_")] = f"{float(value):.3f}"
        return shown
