"""A run that ends early, whatever the reason, saves a checkpoint first, so that it can resume."""

import contextlib
import copy
import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from cpm_rcnn.training.signals import SIGNALS

_log = logging.getLogger(__name__)

# Batches between checks whether another process has received a signal.
_CHECK_EVERY = 10


class Interrupted(BaseException):
    """The run received a signal; not an Exception, because nothing has failed.

    Args:
        number: number of the signal.
        step: the step at which the run will resume.
        saved: whether the checkpoint was written before this was raised.
    """

    def __init__(self, number: int, step: int, saved: bool = True) -> None:
        super().__init__(f"{signal.Signals(number).name} at step {step}")
        self.number = number
        self.saved = saved


class DiskReserve:
    """Disk space that is allocated until it is needed, so that a full disk cannot prevent a last checkpoint.

    Does nothing where the system cannot allocate space.

    Args:
        path: the file that holds the space.
        size: bytes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size

    def allocate(self) -> None:
        """Allocate the space."""
        if not self._size or not hasattr(os, "posix_fallocate"):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
        except OSError as error:
            self.release()
            _log.warning("%s: no space is reserved for a last checkpoint (%s)", self._path, error.strerror)

    def release(self) -> None:
        """Free the space."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


class Interruption(Callback):
    """Saves the run before every validation and on every way out of training.

    After one of :data:`SIGNALS` or Ctrl-C, the run finishes its step, or its batch of a validation, saves and stops. A
    second Ctrl-C stops it immediately. After an exception, the first process saves the state after the last optimizer
    step.

    It must come before all callbacks that can fail between an optimizer step and its record here, and after a moving
    average of the weights.

    Args:
        path: the checkpoint to write.
        reserve: bytes of disk space to keep free for the checkpoint that is written after an exception.

    Attributes:
        received: number of the last signal; 0 if there was none.
        saved_step: the step of the checkpoint that an exception made it save; None if there is none.
    """

    def __init__(self, path: Path, reserve: int = 0) -> None:
        self.path = path
        self.received = 0
        self.saved_step: int | None = None
        self._reserve = DiskReserve(path.with_name("reserved_space"), reserve)
        self._trainer: pl.Trainer | None = None
        # The progress of Lightning's loops after the last optimizer step, and that step's number.
        self._progress: dict[str, Any] | None = None
        self._step = self._first_step = -1
        self._version = -1
        self._leaving = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace Lightning's signal handlers; Lightning restores the previous ones when the run ends."""
        self._trainer = trainer
        self._step = self._first_step = trainer.global_step
        if trainer.is_global_zero:
            self._reserve.allocate()
        _handle(self._note, [*SIGNALS, signal.SIGINT])

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the progress after an optimizer step, and stop here if a signal was received.

        Between accumulated gradients there is nothing to do: a run resumes at the first batch of a step.
        """
        if trainer.global_step == self._step:
            return
        self._record(trainer)
        self._stop_if_signaled(trainer, module, trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save what has been trained, because a validation can fail and can take long."""
        if trainer.state.fn == TrainerFn.FITTING and self._progress is not None:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop in a validation during training if a signal was received."""
        if trainer.state.fn == TrainerFn.FITTING and self._progress is not None:
            self._stop_if_signaled(trainer, module, batch_idx)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the progress after the last optimizer step, whenever the checkpoint is written.

        Weights and optimizer are of that moment too. The order of the data and the random numbers are functions of the
        step, so every checkpoint resumes in the same way.
        """
        if self._is_between_steps(trainer):
            checkpoint["loops"]["fit_loop"] = copy.deepcopy(self._progress)
            checkpoint["global_step"] = self._step

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Save the state after the last optimizer step, in the first process and without waiting for the others."""
        self._leaving = True
        self._reserve.release()
        interrupted = isinstance(exception, Interrupted) and exception.saved
        if interrupted or self._progress is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if not self._is_between_steps(trainer):
            _log.warning("stopped within an optimizer step, which cannot be saved; %s is of an earlier step", self.path)
            return
        if trainer.is_global_zero:
            try:
                # ``trainer.save_checkpoint`` would wait for processes that may have failed.
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.save_checkpoint(checkpoint, self.path)
            except Exception as error:  # the exception that ends the run is more important
                _log.warning("step %d could not be saved: %s", self._step, error)
                return
        self.saved_step = self._step

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Free the reserved disk space."""
        if trainer.is_global_zero:
            self._reserve.release()

    def _record(self, trainer: pl.Trainer) -> None:
        self._progress = trainer.fit_loop.state_dict()
        # The run may be extended later, and then this batch is not the last of its pass over the data.
        self._progress["epoch_loop.batch_progress"]["is_last_batch"] = False
        self._step = trainer.global_step
        self._version = _version(trainer)

    def _is_between_steps(self, trainer: pl.Trainer) -> bool:
        """Whether weights and optimizer are in the state after the last recorded step, not within the next one."""
        return self._progress is not None and _version(trainer) == self._version

    def _stop_if_signaled(self, trainer: pl.Trainer, module: pl.LightningModule, batch: int) -> None:
        received = self.received
        if trainer.world_size > 1:
            if batch % _CHECK_EVERY:
                return
            received = int(trainer.strategy.reduce(torch.tensor(received, device=module.device), reduce_op="max"))
        if received:
            self._leaving = True
            trainer.save_checkpoint(self.path, weights_only=False)
            raise Interrupted(received, trainer.global_step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT == self.received
        self.received = number
        if again and not self._leaving:
            assert self._trainer is not None
            if self._step == self._first_step or self._is_between_steps(self._trainer):
                raise Interrupted(number, self._step, saved=False)


class EvaluationSignals(Callback):
    """Lets a signal end the process immediately during an evaluation outside training, where there is nothing to save.

    Lightning's handler would wait for the other processes, which wait for something else, and all would hang.
    """

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace Lightning's signal handlers."""
        if trainer.state.fn != TrainerFn.FITTING:
            _handle(signal.SIG_DFL, SIGNALS)

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Replace Lightning's signal handlers."""
        _handle(signal.SIG_DFL, SIGNALS)


def _version(trainer: pl.Trainer) -> int:
    """A number that grows with every change of a weight or of the optimizer's state."""
    tensors = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    for state in trainer.optimizers[0].state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor._version for tensor in tensors)


def _handle(handler: Any, numbers: list[signal.Signals]) -> None:
    """Set the handler of signals; Python allows that in the main thread only."""
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, handler)
