"""The folder that keeps compiled CPU kernels between runs.

What it contains is executed, so a folder or file that another user could have written is refused. The name of a library
ends with a hash of its content: a file that was cut off or changed by accident is not loaded.
"""

import hashlib
import os
import stat
from pathlib import Path


class KernelError(Exception):
    """The reason why CPU kernels cannot be used, in one line."""


def cache_folder() -> Path:
    """Return ``$CPM_RCNN_KERNELS``, or ``cpm_rcnn/kernels`` in ``$XDG_CACHE_HOME``, which is ``~/.cache`` by default.

    It is not the cache of remote files, which may be large, on another disk, and read by others.

    Raises:
        KernelError: the user has no home folder.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cpm_rcnn" / "kernels"
    try:
        return Path(os.environ.get("CPM_RCNN_KERNELS") or default).expanduser().absolute()
    except RuntimeError as error:
        raise KernelError(f"{error} Set CPM_RCNN_KERNELS to a folder") from None


def create_folder(folder: Path) -> None:
    """Create a folder inside :func:`cache_folder`, with all folders above it, such that no other user can write to it.

    Raises:
        KernelError: it cannot be created, or :func:`check_owner` refuses one of the folders.
    """
    root = cache_folder()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for each in _from_root(folder):
            each.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise KernelError(f"{root} cannot be written ({error.strerror}). Set CPM_RCNN_KERNELS to a folder") from None
    check_owner(folder)


def check_owner(path: Path) -> None:
    """Check that nobody but this user and root could have written a path and the folders from :func:`cache_folder` on.

    Folders whose sticky bit is set, such as ``/tmp``, may be written by others, because they cannot replace what is in
    there. Paths that do not exist are not checked.

    Raises:
        KernelError: another user could have.
    """
    for each in _from_root(path):
        try:
            status = each.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise KernelError(f"{each} cannot be read ({error.strerror})") from None
        if status.st_uid not in (0, os.geteuid()):
            raise KernelError(f"{each} belongs to another user. Set CPM_RCNN_KERNELS to a folder of your own")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            raise KernelError(f"{each} can be written by other users. Run chmod go-w {each}")


def find_library(folder: Path, name: str) -> Path | None:
    """Return the library that :func:`store_library` has stored; None if there is none, or if it is damaged.

    Raises:
        KernelError: another user could have written it.
    """
    for path in folder.glob(f"{name}-*.so"):
        check_owner(path)
        if path == _stored_path(folder, name, path):
            return path
    return None


def store_library(folder: Path, name: str, built: Path) -> None:
    """Move a library into ``folder``, in one step.

    Args:
        folder: where :func:`find_library` looks for it.
        name: name of the kernel.
        built: the library, on the same file system.
    """
    for damaged in folder.glob(f"{name}-*.so"):
        damaged.unlink(missing_ok=True)
    built.chmod(built.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
    built.replace(_stored_path(folder, name, built))


def _from_root(path: Path) -> list[Path]:
    """:func:`cache_folder` and the paths inside it that lead to ``path``."""
    root = cache_folder()
    return [each for each in reversed([path, *path.parents]) if each.is_relative_to(root)]


def _stored_path(folder: Path, name: str, content: Path) -> Path:
    """The path of a library with this content."""
    with content.open("rb") as file:
        return folder / f"{name}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.so"
