"""Reading and writing of a run's checkpoints by Lightning."""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from cpm_rcnn.weights.resume import ResumePoint
from cpm_rcnn.weights.writing import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, to local folders only, and does not read the same checkpoint twice.

    Args:
        known: the checkpoint that the run resumes from, which has been read already.
    """

    def __init__(self, known: ResumePoint | None = None) -> None:
        super().__init__()
        self._known = known

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            UserError: the file cannot be written, for example because the disk is full.
        """
        write_atomically(path, lambda file: torch.save(checkpoint, file), "; the previous checkpoint is intact")

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The content of ``path``."""
        known, self._known = self._known, None
        if known is not None and Path(path) == known.path:
            return known.checkpoint
        return super().load_checkpoint(path, *arguments, **options)
