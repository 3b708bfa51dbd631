"""A run that is told to stop saves where it is, so that it can go on there."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn

# Clusters send the first at the end of a job's time or before they take the machine away, and, if asked, the second
# some time before that.
SIGNALS = [signal.SIGTERM] + ([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])
# Steps between two looks at whether another process was told to stop.
_ASK_EVERY = 10


class Interrupted(BaseException):
    """The run was told to stop, and has saved where it is; not an Exception, as nothing has gone wrong.

    Args:
        number: of the signal.
        step: of the run, where it goes on.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name} at step {step}")
        self.number = number


class Interruption(Callback):
    """Saves and ends the run at the next step when a signal of :data:`SIGNALS` has come to any of its processes.

    Args:
        path: the checkpoint to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._received = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Listen, instead of Lightning's handler; Lightning puts back what there was before it."""
        _handle(self._note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps of the optimizer the state is whole."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        received = self._received
        if trainer.world_size > 1:
            if trainer.global_step % _ASK_EVERY:
                return
            received = int(trainer.strategy.reduce(torch.tensor(received, device=module.device), reduce_op="max"))
        if received:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise Interrupted(received, trainer.global_step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number


class EvaluationSignals(Callback):
    """Lets a signal end the process at once where there is nothing to save: in an evaluation that is not training's.

    Lightning's handler would call for the other processes, which are waiting for something else: all would hang.
    """

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the place of Lightning's handler."""
        if trainer.state.fn != TrainerFn.FITTING:
            _handle(signal.SIG_DFL)

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the place of Lightning's handler."""
        _handle(signal.SIG_DFL)


def _handle(handler: Any) -> None:
    """Give all of :data:`SIGNALS` a handler, where Python allows it."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)
