"""Which process of a distributed run does not answer."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

_log = logging.getLogger(__name__)


class ProcessWatch(Callback):
    """Names the processes that a run waits for if it makes no progress for a time.

    A thread in every process publishes once in a while how far the process has come, in the key-value store of the
    process group. A stopped process publishes nothing, and a hung one has come less far than the others, which wait for
    it. Steps are not delayed. The collective operation that waits fails a little later than the message, because the
    time limit of the process group is set to a little more than ``timeout``.

    It must come before callbacks with collective operations. It does nothing in a run with one process.

    Args:
        timeout: seconds without progress.

    Attributes:
        message: which processes did not answer; None as long as all do.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.message: str | None = None
        self._interval = min(5.0, timeout / 5)
        self._position = 0
        self._moved = 0.0
        self._thread = 0
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        # For each other process: what it published last, and when this changed.
        self._known: dict[int, tuple[int, int]] = {}
        self._heard: dict[int, float] = {}

    def attach(self, trainer: pl.Trainer) -> None:
        """Set the time limit of the process group, which the strategy creates when the run starts."""
        if hasattr(trainer.strategy, "_timeout"):
            trainer.strategy._timeout = timedelta(seconds=self.timeout + 2 * self._interval + 1)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start to watch."""
        self._start(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start to watch, unless training has started it."""
        self._start(trainer)

    def on_train_batch_start(self, *arguments: Any) -> None:
        """The batch was loaded."""
        self._move()

    def on_before_backward(self, *arguments: Any) -> None:
        """The forward pass is done."""
        self._move()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """The step is done."""
        self._move()

    def on_validation_batch_start(self, *arguments: Any) -> None:
        """The batch was loaded."""
        self._move()

    def on_validation_batch_end(self, *arguments: Any) -> None:
        """The batch was evaluated."""
        self._move()

    def on_validation_end(self, *arguments: Any) -> None:
        """The metric was computed."""
        self._move()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Stop to watch."""
        self._ended.set()
        self._threads.clear()

    def _start(self, trainer: pl.Trainer) -> None:
        self._move()
        if trainer.world_size == 1 or self._threads or not torch.distributed.is_initialized():
            return
        # No public function returns the store.
        store = torch.distributed.distributed_c10d._get_default_store()
        rank, world_size = trainer.global_rank, trainer.world_size
        now = time.monotonic()
        self._thread = threading.get_ident()
        self._ended = threading.Event()
        self._known, self._heard = {}, {other: now for other in range(world_size) if other != rank}
        # Two threads, because publishing can block: the store itself is in one of the processes.
        publish = lambda: self._publish(store, trainer.state.fn, rank)  # noqa: E731
        for task in (publish, lambda: self._check(rank)):
            self._threads.append(threading.Thread(target=self._repeat, args=(task, self._ended), daemon=True))
            self._threads[-1].start()

    def _move(self) -> None:
        self._position += 1
        self._moved = time.monotonic()

    def _progress(self) -> int:
        """The position; at the same one, a process that waits in a collective operation is ahead of one that hangs."""
        frame = sys._current_frames().get(self._thread)
        while frame is not None and not frame.f_globals.get("__name__", "").startswith("torch.distributed"):
            frame = frame.f_back
        return 2 * self._position + (frame is not None)

    def _repeat(self, task: Callable[[], None], ended: threading.Event) -> None:
        while not ended.wait(self._interval / 2):
            try:
                task()
            except Exception:  # the process group is being destroyed, or the process with the store has ended
                return

    def _publish(self, store: Any, stage: Any, rank: int) -> None:
        """Publish this process's position and read those of the others; ``add`` never waits for a key."""
        name = f"cpm_rcnn/{stage}"
        store.add(f"{name}/beats/{rank}", 1)
        store.add(f"{name}/position/{rank}", self._progress() - store.add(f"{name}/position/{rank}", 0))
        for other in self._heard:
            state = store.add(f"{name}/beats/{other}", 0), store.add(f"{name}/position/{other}", 0)
            if state[0] != self._known.get(other, (0, 0))[0]:
                self._heard[other] = time.monotonic()
            self._known[other] = state

    def _check(self, rank: int) -> None:
        now = time.monotonic()
        if self.message is not None or now - self._moved < self.timeout:
            return
        silent = [other for other, heard in self._heard.items() if now - heard > max(2 * self._interval, 1)]
        # If the store does not answer either, nothing was heard from anyone; the store belongs to rank 0.
        if len(silent) == len(self._heard) > 1 and 0 in silent:
            silent = [0]
        if silent:
            why = "stopped or unreachable"
        else:
            silent = [other for other, (_, position) in self._known.items() if position < self._progress()]
            why = "hangs"
        if not silent:
            return  # this process is among those that the others wait for, or they all are
        names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        self.message = f"{names} did not answer for {self.timeout:g} s ({why}); rank {rank} waited (process_timeout)"
        _log.error("%s", self.message)
