"""A local cache of limited size that many processes share."""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from math import inf
from pathlib import Path

from filelock import FileLock

from cpm_rcnn.errors import UserError

FOLDER_VARIABLE = "CPM_RCNN_CACHE"
LIMIT_VARIABLE = "CPM_RCNN_CACHE_GB"
_DEFAULT_GB = 20.0
# When the cache is full, the least recently used files are removed until this part of the limit is in use.
_KEPT = 7 / 8
_UNFINISHED = ".part"
# Seconds after which an unfinished file is that of a process that was killed.
_ABANDONED = 24 * 3600.0


class Cache:
    """Versions of files in a folder. A file appears complete or not at all.

    The name of an entry contains hashes of its key and its version, and its size. Its time of modification is when the
    version was last compared with the original; its time of access, when it was last used.

    Args:
        folder: the folder, which is created when something is stored.
        limit: maximum size in bytes of all complete entries.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    @classmethod
    def from_environment(cls) -> "Cache":
        """The cache in the folder ``CPM_RCNN_CACHE``, of at most ``CPM_RCNN_CACHE_GB`` (default 20) times 10^9 bytes.

        Raises:
            UserError: the limit is not a positive number.
        """
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cpm_rcnn"
        folder = Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser()
        stated = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_GB)
        try:
            gigabytes = float(stated)
        except ValueError:
            gigabytes = 0.0
        if not 0 < gigabytes < inf:
            raise UserError(f"{LIMIT_VARIABLE}={stated}: must be a number above 0, in GB")
        return cls(folder, int(gigabytes * 1e9))

    def find(self, key: str, version: str | None = None, checked_since: float | None = None) -> Path | None:
        """An entry, which is marked as used now.

        Args:
            key: name of the original.
            version: its present version, with which the entry is marked as compared. None takes any version.
            checked_since: the time (seconds since 1970) after which the entry must have been compared.
        """
        start = self._start(key) if version is None else f"{self._start(key)}-{_hash(version, 16)}-"
        for path in self._entries(start):
            with contextlib.suppress(OSError, ValueError):  # another process has removed it, or it is not ours
                state = path.stat()
                complete = state.st_size == int(path.name.rpartition("-")[2])
                if complete and (checked_since is None or state.st_mtime >= checked_since):
                    now = time.time_ns()
                    os.utime(path, ns=(now, state.st_mtime_ns if version is None else now))
                    return path
        return None

    def store(self, key: str, version: str, parts: Iterable[bytes]) -> Path:
        """Add an entry in place of other versions; others are removed if there is no room.

        Args:
            key: name of the original.
            version: its version.
            parts: its content, of at most ``limit`` bytes.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        folder = self.folder / _hash(key, 3)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(suffix=_UNFINISHED, dir=folder)
        try:
            with open(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                size = file.tell()
            target = folder / f"{self._start(key)}-{_hash(version, 16)}-{size}"
            older = [path for path in self._entries(self._start(key)) if path != target]
            with FileLock(self.folder / "size.lock"):
                self._make_room(size)
                now = time.time_ns()  # the clock of a file server may differ
                os.utime(temporary, ns=(now, now))
                os.replace(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # it is still there if anything failed
        for path in older:
            path.unlink(missing_ok=True)
        return target

    def downloading(self, key: str) -> AbstractContextManager[object]:
        """A context that one process at a time can enter, so that the others find what it has stored.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = self.folder / "downloads"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return FileLock(folder / f"{_hash(key, 2)}.lock")

    def _start(self, key: str) -> str:
        return _hash(key, 40)

    def _entries(self, start: str) -> list[Path]:
        """The complete entries whose names have this start."""
        try:
            with os.scandir(self.folder / start[:3]) as entries:
                return [Path(entry.path) for entry in entries if entry.name.startswith(start)]
        except OSError:
            return []

    def _make_room(self, size: int) -> None:
        """Count ``size`` bytes more, and remove entries if that exceeds the limit. The caller holds the lock."""
        counter = self.folder / "size"
        try:
            total = int(counter.read_text())
        except (OSError, ValueError):
            total = self.limit  # unknown, so it is counted below
        if total + size > self.limit:
            total = self._remove_least_recent(size)
        counter.write_text(str(total + size))

    def _remove_least_recent(self, size: int) -> int:
        """Remove entries until ``size`` bytes more fit; returns the bytes that are left."""
        found = []
        for path in self.folder.glob("???/*"):
            with contextlib.suppress(OSError):
                state = path.stat()
                if path.suffix != _UNFINISHED:
                    found.append((state.st_atime_ns, state.st_size, path))
                elif state.st_mtime < time.time() - _ABANDONED:
                    path.unlink()
        total = sum(entry_size for _, entry_size, _ in found)
        if total + size <= self.limit:
            return total
        for _, entry_size, path in sorted(found):
            if total + size <= self.limit * _KEPT:
                break
            path.unlink(missing_ok=True)
            total -= entry_size
        return total


def _hash(text: str, digits: int) -> str:
    """The first hexadecimal digits of a hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
