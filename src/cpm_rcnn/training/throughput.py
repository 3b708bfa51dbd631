"""Training speed, and the time spent waiting for data."""

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs ``train/images_per_s`` and ``train/data_wait_s`` every ``log_every_n_steps`` optimizer steps.

    Both are averages over the batches since the last log. ``images_per_s`` counts the images of all processes and
    assumes that each has as many as this one. ``data_wait_s`` is the mean time per batch, in seconds, between the end
    of one batch and the start of the next: the wait for the loader and the short work of other callbacks.

    The clock does not wait for the GPU. Kernels of a batch may still run when ``on_train_batch_end`` is called, but the
    host cannot get many batches ahead, so an average over many batches is accurate. Validations, the checkpoints
    written with them, and the first batch of a run, for which the workers start, are excluded.

    A batch is a pair ``(images, targets)`` of lists.
    """

    def __init__(self) -> None:
        self._paused = False
        self._stopped_at = 0.0
        self._logged_step = 0
        self._start_window(0.0)

    def _start_window(self, now: float) -> None:
        self._window_start = now
        self._batches = 0
        self._images = 0
        self._waited = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, paused until the first batch."""
        self._logged_step = trainer.global_step
        self._stopped_at = time.perf_counter()
        self._start_window(self._stopped_at)
        self._paused = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause the clock until training continues."""
        self._stopped_at = time.perf_counter()
        self._paused = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch as waiting, or as a pause."""
        gap = time.perf_counter() - self._stopped_at
        if self._paused:
            self._window_start += gap
            self._paused = False
        else:
            self._waited += gap

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log at the end of a window."""
        images, _ = batch
        self._batches += 1
        self._images += len(images)
        now = time.perf_counter()
        step = trainer.global_step
        # With accumulated gradients the step stays the same for several batches: log at the first of them.
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set where mypy cannot see it
        if every and step % every == 0 and step > self._logged_step:
            pl_module.log_dict(
                {
                    "train/images_per_s": self._images * trainer.world_size / (now - self._window_start),
                    "train/data_wait_s": self._waited / self._batches,
                },
                on_step=True,
                on_epoch=False,
                batch_size=len(images),
            )
            self._logged_step = step
            self._start_window(now)
        self._stopped_at = now
