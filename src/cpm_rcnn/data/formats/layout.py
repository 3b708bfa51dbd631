"""Where the annotations and images of a data set are: what the readers of all formats share."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cpm_rcnn.data.raw import RawAnnotations
from cpm_rcnn.data.settings import Split
from cpm_rcnn.errors import UserError
from cpm_rcnn.remote.urls import Location

IMAGE_SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Usual names of folders and of splits in list files and attributes, in lower case.
IMAGE_FOLDERS = ("jpegimages", "images", "imgs", "img")
SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split.

    Attributes:
        path: the file or folder that states which images the split has.
        images: the folder that file names of images start from.
        read: reads the annotations; the argument is whether to show a progress bar if it takes long.
        absent: why the split cannot be read, if the data set states it, but its files do not exist.
    """

    path: Location
    images: Location
    read: Callable[[bool], RawAnnotations]
    absent: str | None = None


@dataclass(frozen=True)
class Layout:
    """A data set in one format.

    Attributes:
        format: name of the format.
        evidence: what it was recognized by, for messages.
        splits: the splits that it has.
    """

    format: str
    evidence: str
    splits: Mapping[Split, SplitFiles]


def split_of(name: str) -> Split | None:
    """The split that a name means, in any case; None if it means none."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def subfolders(folder: Path) -> dict[str, Path]:
    """The folders in ``folder`` by their names in lower case."""
    return {entry.name.lower(): Path(entry.path) for entry in _entries(folder) if entry.is_dir()}


def split_folders(folder: Path) -> dict[Split, Path]:
    """The folders in ``folder`` that are named like splits."""
    found: dict[Split, Path] = {}
    for name, path in sorted(subfolders(folder).items()):
        if (split := split_of(name)) is not None:
            found.setdefault(split, path)
    return found


def image_folder(folder: Path) -> Path:
    """The folder in ``folder`` that is named like a folder of images, or else ``folder`` itself."""
    named = subfolders(folder)
    return next((named[name] for name in IMAGE_FOLDERS if name in named), folder)


def files_in(folder: Path, suffixes: Iterable[str]) -> list[str]:
    """The sorted names of the files in ``folder`` with one of the ``suffixes``, in any case."""
    return sorted(
        entry.name for entry in _entries(folder) if entry.name.lower().endswith(tuple(suffixes)) and entry.is_file()
    )


def images_below(folder: Path) -> list[Path]:
    """The images in ``folder`` and its subfolders, sorted by path."""
    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    return sorted(found)


def listed_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers.

    Raises:
        UserError: the file cannot be read, or has no such line.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), start=1)]
    if not (found := [(number, line) for number, line in lines if line]):
        raise UserError(f"{path}: is empty, but must list the images of its split")
    return found


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8") from None


def shown_path(path: Path, folder: Path) -> str:
    """A path from ``folder``, if it is inside."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
