"""The images and videos that files, folders, patterns, archives and URLs name. It does not import torch."""

import os
import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import has_magic
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from cpm_rcnn.data.image_files import image_files, short
from cpm_rcnn.errors import ArgumentError, UserError, check_path
from cpm_rcnn.remote.files import read
from cpm_rcnn.remote.urls import Location, Url, check_url, is_url

# Other files in a folder or an archive are skipped.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg")


@dataclass(frozen=True)
class SourceFile:
    """An image or a video.

    Attributes:
        name: a unique name with slashes: its path from the folder that all local files, or all URLs, have in common.
        label: its name in messages.
        location: the file or, if it is in an archive, the archive.
        read: returns its content. Raises :class:`UserError` if it is missing or cannot be read, and
            :class:`~cpm_rcnn.errors.UnavailableError` if its server refuses or does not answer.
    """

    name: str
    label: str
    location: Location
    read: Callable[[], bytes]

    @property
    def is_video(self) -> bool:
        """Whether its suffix is that of a video."""
        return _suffix(self.name) in VIDEO_SUFFIXES


@dataclass(frozen=True)
class _Found:
    """A file whose name depends on the others. ``path`` is absolute, and ``folder`` a part of it."""

    folder: PurePosixPath
    path: PurePosixPath
    label: str
    location: Location
    read: Callable[[], bytes]


def find_sources(value: Any) -> list[SourceFile]:
    """The images and videos of ``source``.

    Args:
        value: a file, a folder, a pattern, in which ``**`` stands for any folders, a .zip file or a URL of an image, a
            video or a .zip file, or a list of these.

    Returns:
        At least one file, each once, in the order of the values, and inside a folder, a pattern or an archive in the
        order of their names.

    Raises:
        UserError: a value is none of these, or it matches nothing, or there are videos but no package for them.
        UnavailableError: the server of an archive refuses or does not answer.
    """
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise ArgumentError("source", "=[]: must have an image, a folder, a pattern or a URL")
    unique: dict[tuple[PurePosixPath, str], _Found] = {}
    for each in values:
        for file in _remote(each) if is_url(each) else _local(each):
            # URLs may differ in their queries only, which the path does not contain.
            unique.setdefault((file.path, file.location.text if isinstance(file.location, Url) else ""), file)
    found = list(unique.values())
    sources = [SourceFile(name, each.label, each.location, each.read) for name, each in zip(_names(found), found)]
    for source in sources:
        if source.is_video and find_spec("av") is None:
            raise UserError(f"{source.label}: videos need the package av: pip install 'cpm-rcnn[video]'")
    return sources


def find_images(source: Path, videos: bool = False) -> tuple[Path, list[str]]:
    """The images of a local path.

    Args:
        source: a file of any suffix, a folder, or a pattern, in which ``**`` stands for any folders.
        videos: whether videos are taken too.

    Returns:
        A folder, and the sorted names of the files, relative to it.

    Raises:
        UserError: ``source`` does not exist, is an invalid pattern, matches nothing, or is a folder without such a
            file or with a folder that cannot be listed.
    """
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) if videos else IMAGE_SUFFIXES
    wanted = f"image{' or video' * videos}"
    if source.is_file():
        return source.parent, [source.name]
    if source.is_dir():
        folder, names = source, image_files(source).names()
        problem = f"no {wanted} in this folder"
    elif has_magic(str(source)):
        parts = source.parts
        # A folder that has this name is meant, not what its brackets match.
        fixed = next(k for k, part in enumerate(parts) if has_magic(part) and not Path(*parts[: k + 1]).is_dir())
        folder = Path(*parts[:fixed])
        try:
            paths = list(folder.glob(str(Path(*parts[fixed:]))))
        except ValueError as error:
            raise UserError(f"source={source}: {error}") from None
        names = sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file() or not path.exists())
        problem = f"matches no {wanted}"
    else:
        raise UserError(f"source={source}: no such file or folder")
    names = [name for name in names if _suffix(name) in suffixes]
    if not names:
        raise UserError(f"source={source}: {problem} ({' '.join(suffixes)})")
    return folder, names


def _local(value: Any) -> Iterator[_Found]:
    path = check_path("source", str(value) if isinstance(value, int) and not isinstance(value, bool) else value)
    if path.suffix.lower() == ".zip" and path.is_file():
        yield from _in_archive(path, _absolute(path))
        return
    folder, names = find_images(path, videos=True)
    files = image_files(folder)
    base = _absolute(folder)
    for name in names:
        path = folder / name
        yield _Found(base, base / name, short(str(path)), path, partial(files.read, name))


def _remote(value: str) -> Iterator[_Found]:
    check_url("source", value)
    url = Url(value)
    path = PurePosixPath("/", str(url).partition("://")[2])
    suffix = url.suffix.lower()
    if suffix == ".zip":
        yield from _in_archive(url, path)
    elif suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) or url.scheme in ("http", "https"):
        yield _Found(path.parent, path, short(str(url)), url, partial(read, url, time.time()))
    else:
        raise ArgumentError(
            "source", f"={url}: must be an image, a video or a .zip, by its suffix; remote folders are not listed"
        )


def _in_archive(location: Location, path: PurePosixPath) -> Iterator[_Found]:
    """The images of an archive; ``path`` is its own."""
    files = image_files(location)
    names = [name for name in files.names() if _suffix(name) in IMAGE_SUFFIXES and not name.startswith("__MACOSX/")]
    if not names:
        raise ArgumentError("source", f"={location}: no image in this archive ({' '.join(IMAGE_SUFFIXES)})")
    for name in names:
        # Some programs write absolute names.
        place = path / name.lstrip("/")
        yield _Found(path, place, short(f"{location}: {name}"), location, partial(files.read, name))


def _names(found: Sequence[_Found]) -> Iterator[str]:
    """A name for each file. Results are written to paths that contain it, so it has no ``..``."""
    folders: dict[bool, list[str]] = {}
    for file in found:
        folders.setdefault(isinstance(file.location, Url), []).append(str(file.folder))
    common = {remote: len(PurePosixPath(posixpath.commonpath(paths)).parts) for remote, paths in folders.items()}
    taken: set[str] = set()
    for file in found:
        parts = file.path.parts[common[isinstance(file.location, Url)] :]
        path = PurePosixPath(*(part for part in parts if not set(part) <= {"/", "."}))
        name, number = str(path), 1
        while name in taken:  # URLs that differ in their queries only, or a local and a remote file
            number += 1
            name = str(path.with_name(f"{path.stem}_{number}{path.suffix}"))
        taken.add(name)
        yield name


def _absolute(path: Path) -> PurePosixPath:
    return PurePosixPath("/", Path(os.path.abspath(path)).as_posix())


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
