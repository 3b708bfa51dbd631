"""Non-finite losses: report them, save the batch, and stop the run or skip the step."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from cpm_rcnn.errors import UserError, check_choice

ACTIONS = ("raise", "skip")
# Maximum number of batches that each process of a run saves.
_MAX_SAVED = 5
_log = logging.getLogger(__name__)


class NonFiniteGuard(Callback):
    """Checks whether the loss is finite in all processes, at every step.

    Whether the loss is finite is computed on the device before the backward pass and read after the backward pass was
    queued, so that a GPU does not become idle.

    Args:
        action: ``raise`` ends the run; ``skip`` leaves the weights unchanged at this step, in all processes. A step
            with accumulated gradients is skipped as a whole.
        folder: where the batch of a non-finite loss is saved, so that it can be replayed.

    Raises:
        ArgumentError: ``action`` is neither of these.
    """

    def __init__(self, action: str, folder: Path) -> None:
        check_choice("on_nonfinite", action, ACTIONS)
        self.action = action
        self.folder = folder
        self._batch: tuple[Any, int] | None = None
        self._nonfinite: Tensor | None = None
        self._saved = 0
        self._skips = False

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch until its losses have been checked."""
        self._batch = batch, batch_idx
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._skips = False  # the first batch of an optimizer step

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Start to reduce the check over all processes, without waiting for the result."""
        self._nonfinite = (~torch.isfinite(loss.detach())).float()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self._nonfinite, torch.distributed.ReduceOp.MAX)

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Act if the loss of any process was not finite at any batch of this step."""
        assert self._nonfinite is not None
        if self._nonfinite.item():
            message = self._describe(trainer, module)
            if self.action == "raise":
                raise UserError(f"{message}; with on_nonfinite=skip such steps are skipped")
            _log.warning("%s; step skipped", message)
            self._skips = True
        if not self._skips:
            return
        for parameter in module.parameters():
            if trainer.scaler is None:
                parameter.grad = None
            elif parameter.grad is not None:
                # A gradient scaler needs gradients to inspect. It skips the step if one is infinite.
                parameter.grad.fill_(float("inf"))

    def _describe(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        """One line that names the non-finite losses; the batch is saved if they are of this process."""
        assert self._batch is not None
        batch, batch_idx = self._batch
        where = f"step {trainer.global_step} (batch {batch_idx})"
        wrong = [f"{name}={value.item()}" for name, value in module.losses.items() if not value.isfinite()]  # type: ignore[union-attr,operator]
        if not wrong:
            return f"{where}: a loss of another process is not finite"
        images = [target["image_id"] for target in batch[1]]
        saved = ""
        if self._saved < _MAX_SAVED:
            self._saved += 1
            path = self.folder / f"nonfinite_batch{batch_idx}_rank{trainer.global_rank}.pt"
            torch.save({"images": batch[0], "targets": batch[1], "losses": dict(module.losses)}, path)  # type: ignore[arg-type]
            saved = f"; the batch was saved as {path}"
        return f"{where}: {', '.join(wrong)} on images {images}{saved}"
