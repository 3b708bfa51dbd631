"""How fast training goes, and how long it waits for data."""

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs ``train/images_per_s`` and ``train/data_wait_s`` every ``log_every_n_steps`` optimizer steps.

    Both are over the batches since the last log. ``images_per_s`` counts the images of all processes, taking
    each to have as many as this one. ``data_wait_s`` is the mean time per batch, in seconds, from the end of one
    batch to the start of the next: the wait for the loader, and the little that other callbacks do.

    The clock never waits for the GPU: a kernel may still run when its batch "ends", but over a window of many
    batches the launches cannot run far ahead, so the mean holds. Validation, checkpoints written with it, and
    the first batch of a run, for which the workers start, are left out of both figures: such a gap counts as no
    wait at all.

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
        """Start the clock, paused until the first batch is there."""
        self._logged_step = trainer.global_step
        self._stopped_at = time.perf_counter()
        self._start_window(self._stopped_at)
        self._paused = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause the clock until training goes on."""
        self._stopped_at = time.perf_counter()
        self._paused = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the time since the last batch as a wait, or as part of a pause."""
        gap = time.perf_counter() - self._stopped_at
        if self._paused:
            self._window_start += gap
            self._paused = False
        else:
            self._waited += gap

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log where it ends a window."""
        images, _ = batch
        self._batches += 1
        self._images += len(images)
        now = time.perf_counter()
        step = trainer.global_step
        # With accumulated gradients the step stands still over several batches: log at the first of them.
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
