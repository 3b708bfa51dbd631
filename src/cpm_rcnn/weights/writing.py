"""Files that appear complete or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cpm_rcnn.errors import UserError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], None], advice: str = "") -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it.

    An exception leaves the previous file unchanged and no temporary file. A process that is killed can leave a
    temporary file, which ends in ``.part``.

    Args:
        path: the file, in a local folder; missing folders are created.
        write: writes the content to an open file.
        advice: what to add to the message of an error.

    Raises:
        UserError: the file cannot be written, for example because the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{target}: cannot be written ({reason}){advice}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # it is still there if anything failed
