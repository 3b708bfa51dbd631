"""Random numbers that depend only on the seed and the position in the run."""

import random
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback


class StepSeed(Callback):
    """Seeds torch before every batch with (seed, batch, rank), so that a resumed run draws the same numbers.

    No generator state needs to be saved, and processes draw different numbers.

    Args:
        seed: random seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed torch; ``batch_idx`` counts from the start of the run, because a run is one pass over its loader."""
        position = f"{self.seed}/{batch_idx}/{trainer.global_rank}"
        torch.manual_seed(random.Random(position).getrandbits(63))
