"""Where image files are: in a folder or a zip archive, local or remote."""

import io
import os
import stat
import time
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from cpm_rcnn.errors import UnavailableError, UserError
from cpm_rcnn.remote.archive import RemoteArchive
from cpm_rcnn.remote.files import read
from cpm_rcnn.remote.transfer import MissingError
from cpm_rcnn.remote.urls import Location, Url


class ImageFiles(Protocol):
    """The files of a folder or an archive."""

    @property
    def path(self) -> Location:
        """The folder or archive."""

    @property
    def is_archive(self) -> bool:
        """Whether it is an archive, in which the end of a file cannot be read without its start."""

    def names(self) -> list[str]:
        """The sorted names of all files, with slashes.

        Raises:
            UserError: this is a remote folder, which is not listed, or a folder cannot be listed.
        """

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            UserError: it is missing or cannot be read.
            UnavailableError: its server refuses or does not answer.
        """

    def open(self, name: str) -> IO[bytes]:
        """A file, opened for reading.

        Raises:
            UserError: as for :meth:`read`, where that is known.
            UnavailableError: its server refuses or does not answer.
            Exception: the file cannot be read; of any type.
        """

    def missing(self, names: Sequence[str]) -> dict[int, str]:
        """Which files do not exist.

        Returns:
            From the position of each such name to a phrase that says why it cannot be read.
        """


def image_files(path: Location) -> ImageFiles:
    """The files of a folder or a zip archive.

    Args:
        path: a folder or a .zip file; if a local ``path`` does not exist, ``path.zip`` is used.

    Raises:
        UserError: neither exists, or the archive cannot be read.
        UnavailableError: the server of a remote archive refuses or does not answer.
    """
    if isinstance(path, Url):
        return _RemoteArchive(path) if path.suffix.lower() == ".zip" else _RemoteFolder(path)
    archive = Path(f"{path}.zip")
    if not path.exists() and archive.is_file():
        path = archive
    if path.is_file():
        return _Archive(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such image folder, and no {archive.name} next to it")
    return _Folder(path)


class _Folder:
    is_archive = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        found = []
        for folder, _, names in os.walk(self.path, onerror=_raise_unlisted):
            paths = (Path(folder, name) for name in names)
            # A link whose target is missing is listed, so that reading it says so.
            found += [path.relative_to(self.path).as_posix() for path in paths if path.is_file() or not path.exists()]
        return sorted(found)

    def read(self, name: str) -> bytes:
        try:
            return _first_existing(self.path, name).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.path}: image {short(name)} not found") from None
        except (OSError, ValueError) as error:  # ValueError for names that the file system does not allow
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path}: {short(name)} cannot be read ({reason})") from error

    def open(self, name: str) -> IO[bytes]:
        return _first_existing(self.path, name).open("rb")

    def missing(self, names: Sequence[str]) -> dict[int, str]:
        """Lists each folder once."""
        listed: dict[str, set[str]] = {}
        problems = {}
        for position, name in enumerate(names):
            folder, _, last = name.rpartition("/")
            if folder not in listed:
                listed[folder] = _listed(self.path / folder)
            # Asks for the file itself as well: the system may ignore case, or not allow the folder to be listed.
            if last not in listed[folder] and not _exists(self.path, name):
                problems[position] = f"image {short(name)} not found"
        return problems


class _Members:
    """The names of an archive's members, in which a file is found by the end of its path."""

    def __init__(self, path: Location, names: Sequence[str]) -> None:
        by_name = defaultdict(list)
        for member in names:
            by_name[member.rpartition("/")[2]].append(member)
        self._path = path
        self._by_name = dict(by_name)
        self._full_names = set(names)

    def names(self) -> list[str]:
        """The sorted names of the members that are files."""
        return sorted(name for name in self._full_names if not name.endswith("/"))

    def find(self, name: str) -> str:
        """The member that is meant by a file name.

        Raises:
            UserError: there is none, or several.
        """
        found: list[str] = []
        for spelling in _spellings(name):
            for exact in (spelling, f"{self._path.stem}/{spelling}"):
                if exact in self._full_names:
                    return exact
            candidates = self._by_name.get(PurePosixPath(spelling).name, [])
            found = found or [member for member in candidates if member.endswith("/" + spelling)]
        if not found:
            raise UserError(f"{self._path}: image {short(name)} not found")
        if len(found) > 1:
            raise UserError(f"{self._path}: image {short(name)} is ambiguous: {found[0]} or {found[1]}")
        return found[0]

    def missing(self, names: Sequence[str]) -> dict[int, str]:
        problems = {}
        for position, name in enumerate(names):
            try:
                self.find(name)
            except UserError as error:
                problems[position] = str(error).removeprefix(f"{self._path}: ")
        return problems


class _Archive:
    """A local archive. It is opened once per process, so that DataLoader workers never share a file position."""

    is_archive = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._members = _Members(path, self._archive().namelist())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def names(self) -> list[str]:
        return self._members.names()

    def read(self, name: str) -> bytes:
        member = self._members.find(name)
        try:
            return self._archive().read(member)
        except UserError:
            raise
        except Exception as error:  # damaged and encrypted members raise many types, also those of zlib and lzma
            raise UserError(f"{self.path}: {short(name)} cannot be read from the archive") from error

    def open(self, name: str) -> IO[bytes]:
        return self._archive().open(self._members.find(name))

    def missing(self, names: Sequence[str]) -> dict[int, str]:
        return self._members.missing(names)

    def _archive(self) -> zipfile.ZipFile:
        # A handle opened before a fork shares its file position with the parent, hence the process id.
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.path}: not a readable zip archive") from error
        return self._opened[1]


class _RemoteFolder:
    """Files behind URLs. The server is asked once per run and file whether the cached copy is still valid."""

    is_archive = False

    def __init__(self, path: Url) -> None:
        self.path = path
        self._start = time.time()

    def names(self) -> list[str]:
        raise UserError(f"{self.path}: remote folders are not listed")

    def read(self, name: str) -> bytes:
        try:
            return read(self.path / name.replace("\\", "/"), self._start)
        except MissingError as error:
            raise UserError(f"{self.path}: image {short(name)} not found") from error

    def open(self, name: str) -> IO[bytes]:
        return io.BytesIO(self.read(name))

    def missing(self, names: Sequence[str]) -> dict[int, str]:
        """Asks for the first file only: a folder may have too many files to be listed, and http has no lists."""
        try:
            for name in names[:1]:
                self.read(name)
        except UserError as error:
            return {0: str(error).removeprefix(f"{self.path}: ")}
        return {}


class _RemoteArchive:
    is_archive = True

    def __init__(self, path: Url) -> None:
        self.path = path
        self._archive = RemoteArchive(path)
        self._members = _Members(path, self._archive.names())

    def names(self) -> list[str]:
        return self._members.names()

    def read(self, name: str) -> bytes:
        member = self._members.find(name)
        try:
            return self._archive.read(member)
        except (UserError, UnavailableError):
            raise
        except Exception as error:  # as for local archives
            raise UserError(f"{self.path}: {short(name)} cannot be read from the archive") from error

    def open(self, name: str) -> IO[bytes]:
        return io.BytesIO(self.read(name))

    def missing(self, names: Sequence[str]) -> dict[int, str]:
        return self._members.missing(names)


def short(file_name: str) -> str:
    """A file name for messages. Bytes that are not UTF-8, which cannot be printed, are escaped."""
    file_name = file_name.encode("utf-8", "backslashreplace").decode()
    return file_name if len(file_name) <= 200 else f"{file_name[:100]}...{file_name[-50:]}"


def _spellings(file_name: str) -> list[str]:
    """The names under which a file may exist: as given, and with the backslashes of Windows as slashes."""
    return [file_name, file_name.replace("\\", "/")] if "\\" in file_name else [file_name]


def _first_existing(folder: Path, file_name: str) -> Path:
    """The path of a file in ``folder`` under the first of its spellings that exists, or else under the first."""
    paths = [folder / name for name in _spellings(file_name)]
    return paths[0] if len(paths) == 1 or paths[0].exists() or not paths[1].exists() else paths[1]


def _raise_unlisted(error: OSError) -> None:
    raise UserError(f"{error.filename}: this folder cannot be listed ({error.strerror})") from error


def _listed(folder: Path) -> set[str]:
    """The names of the files in a folder; empty if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):
        return set()


def _exists(folder: Path, file_name: str) -> bool:
    """Whether there is such a file, also if it is not certain because a folder on the way cannot be entered."""
    try:
        return stat.S_ISREG(_first_existing(folder, file_name).stat().st_mode)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
