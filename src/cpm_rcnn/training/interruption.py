"""A run that receives a signal to stop saves a checkpoint first, so that it can resume."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn

# Clusters send SIGTERM at the end of a job's time or when they preempt it, and on request SIGUSR1 some time before.
SIGNALS = [signal.SIGTERM] + ([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])
# Number of steps between checks whether another process has received a signal.
_CHECK_EVERY = 10


class Interrupted(BaseException):
    """The run received a signal and has saved a checkpoint. It is not an ``Exception``, because nothing has failed.

    Args:
        number: number of the signal.
        step: the step at which the run will resume.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name} at step {step}")
        self.number = number


class Interruption(Callback):
    """Saves a checkpoint and ends the run at the next step after any of its processes received one of :data:`SIGNALS`.

    Args:
        path: the checkpoint to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._received = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace Lightning's signal handlers; Lightning restores the previous ones when the run ends."""
        _handle(self._note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop between two optimizer steps, so that no accumulated gradient is lost."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        received = self._received
        if trainer.world_size > 1:
            if trainer.global_step % _CHECK_EVERY:
                return
            received = int(trainer.strategy.reduce(torch.tensor(received, device=module.device), reduce_op="max"))
        if received:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise Interrupted(received, trainer.global_step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number


class EvaluationSignals(Callback):
    """Lets a signal end the process immediately during an evaluation outside training, where there is nothing to save.

    Lightning's handler would wait for the other processes, which wait for something else, and all would hang.
    """

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace Lightning's signal handlers."""
        if trainer.state.fn != TrainerFn.FITTING:
            _handle(signal.SIG_DFL)

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace Lightning's signal handlers."""
        _handle(signal.SIG_DFL)


def _handle(handler: Any) -> None:
    """Set the handler of all :data:`SIGNALS`; Python allows that in the main thread only."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, handler)
