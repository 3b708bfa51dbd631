"""Random numbers that depend on where a run is, and not on how it got there."""

import random
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback


class StepSeed(Callback):
    """Seeds torch before every batch with (seed, batch, rank), so that a resumed run draws what it would have drawn.

    No state of a generator needs to be saved, and processes draw apart.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """``batch_idx`` counts from the start of the run: a run is one pass over its loader."""
        place = f"{self.seed}/{batch_idx}/{trainer.global_rank}"
        torch.manual_seed(random.Random(place).getrandbits(63))
