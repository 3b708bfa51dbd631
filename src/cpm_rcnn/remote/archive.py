"""Members of a remote zip archive, read by ranges."""

import io
import zipfile
from bisect import bisect_right

from cpm_rcnn.errors import UserError
from cpm_rcnn.remote.files import read_version
from cpm_rcnn.remote.transfer import RemoteFile, describe, fetch
from cpm_rcnn.remote.urls import Url

# The directory at the end of an archive of some thousand members, in one request.
_TAIL = 2**18
_HEADER = 30


class RemoteArchive:
    """A remote zip archive, whose directory is read once.

    It has no open file: processes and threads can share it.

    Args:
        url: the archive.

    Raises:
        UserError: there is no such file, it is not a zip archive, or its server does not send parts of files.
        UnavailableError: the server refuses or does not answer.
    """

    def __init__(self, url: Url) -> None:
        self._file = describe(url)
        try:
            with zipfile.ZipFile(_Ranges(self._file)) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
                self._offsets = sorted(info.header_offset for info in self._members.values())
                self._end = archive.start_dir
        except UserError:
            raise
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise UserError(f"{url}: not a readable zip archive") from error

    def names(self) -> list[str]:
        """The names of the members."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """The content of a member, in one request unless it is in the cache.

        Raises:
            UnavailableError: the server refuses or does not answer.
            Exception: the member is damaged or encrypted; of any type, as from :mod:`zipfile`.
        """
        return read_version(f"{self._file.url.text}\n{name}", self._file.version, lambda: self._fetch(name))

    def _fetch(self, name: str) -> bytes:
        info = self._members[name]
        if info.flag_bits & 1:
            raise zipfile.BadZipFile("is encrypted")
        following = bisect_right(self._offsets, info.header_offset)
        end = self._offsets[following] if following < len(self._offsets) else self._end
        stored = fetch(self._file, info.header_offset, end)
        if stored[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("has no header")
        # The name and the extra field may have other lengths in this header than in the directory.
        lengths = (int.from_bytes(stored[at : at + 2], "little") for at in (26, 28))
        stream = io.BytesIO(stored)
        stream.seek(_HEADER + sum(lengths))
        with zipfile.ZipExtFile(stream, "r", info) as member:
            return member.read()


class _Ranges(io.RawIOBase):
    """A remote file for :mod:`zipfile`, which reads the end of an archive, and then its directory at once."""

    def __init__(self, file: RemoteFile) -> None:
        if file.size is None:
            raise UserError(f"{file.url}: the server does not say how large the archive is")
        self._file = file
        self._size = file.size
        self._position = 0
        self._tail_start = max(0, file.size - _TAIL)
        self._tail = fetch(file, self._tail_start, file.size)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start = min(self._position, self._size)
        end = self._size if size is None or size < 0 else min(start + size, self._size)
        self._position = end
        if start >= self._tail_start:
            return self._tail[start - self._tail_start : end - self._tail_start]
        return fetch(self._file, start, end)
