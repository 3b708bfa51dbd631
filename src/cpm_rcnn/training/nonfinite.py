"""A loss that is no number is named, its batch is kept, and the run stops or passes over the step."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from cpm_rcnn.errors import UserError, check_choice

ACTIONS = ("raise", "skip")
# Batches kept of one process of one run: the first tell what there is to tell.
_MOST_KEPT = 5
_log = logging.getLogger(__name__)


class NonFiniteGuard(Callback):
    """Looks at every loss, in all processes together.

    Whether all losses are finite is found on the device during forward, and read when backward has been queued,
    so that a GPU need not wait.

    Args:
        action: ``raise``: end the run; ``skip``: leave the weights as they are at this step, in all processes.
        folder: where the batch of a faulty loss is saved, for a replay.
    """

    def __init__(self, action: str, folder: Path) -> None:
        check_choice("on_nonfinite", action, ACTIONS)
        self.action = action
        self.folder = folder
        self._batch: tuple[Any, int] | None = None
        self._faulty: Tensor | None = None
        self._kept = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch until its losses have been looked at."""
        self._batch = batch, batch_idx

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Ask all processes, without waiting for the answer."""
        self._faulty = (~torch.isfinite(loss.detach())).float()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self._faulty, torch.distributed.ReduceOp.MAX)

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Act where any loss of any process was faulty."""
        assert self._faulty is not None
        if not self._faulty.item():
            return
        message = self._describe(trainer, module)
        if self.action == "raise":
            raise UserError(f"{message}; on_nonfinite=skip would pass over it")
        _log.warning("%s; passed over", message)
        for parameter in module.parameters():
            if trainer.scaler is None:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()  # a gradient scaler wants one to look at

    def _describe(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        """What is wrong, in a line; the batch is saved where it is this process's."""
        assert self._batch is not None
        batch, batch_idx = self._batch
        where = f"step {trainer.global_step} (batch {batch_idx})"
        wrong = [f"{name}={value.item()}" for name, value in module.losses.items() if not value.isfinite()]  # type: ignore[union-attr,operator]
        if not wrong:
            return f"{where}: a loss of another process is not finite"
        images = [target["image_id"] for target in batch[1]]
        kept = ""
        if self._kept < _MOST_KEPT:
            self._kept += 1
            path = self.folder / f"nonfinite_batch{batch_idx}_rank{trainer.global_rank}.pt"
            torch.save({"images": batch[0], "targets": batch[1], "losses": dict(module.losses)}, path)  # type: ignore[arg-type]
            kept = f"; its batch is in {path}"
        return f"{where}: {', '.join(wrong)} on images {images}{kept}"
