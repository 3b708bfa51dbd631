"""Checkpoint files that are there whole or not at all."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from cpm_rcnn.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside, then renames it: a process killed meanwhile leaves the last one as it was.

    Local folders only, as those of a run are.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; what is aside ends in ``.part``.

        Raises:
            UserError: it cannot be written: the disk is full, or the folder is gone.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{target.name}.part")
        try:
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises the latter
            with contextlib.suppress(OSError):
                aside.unlink()
            reason = str(error).splitlines()[0]
            raise UserError(f"{target}: cannot be written ({reason}); the checkpoint before is whole") from error
