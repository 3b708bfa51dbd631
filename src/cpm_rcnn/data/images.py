"""Where image files live: a folder, or a zip archive read in place."""

import io
import os
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from cpm_rcnn.errors import UserError


class ImageSource:
    """Reads images by the file names that a COCO json gives them.

    A zip member is found by its full name, then under the folder named like the archive (COCO's
    ``train2017.zip`` holds ``train2017/000000000009.jpg``), then by the end of its path. The archive is opened
    once in every process, at its first read, so that DataLoader workers never share a file position.

    Args:
        path: a folder or a .zip file; ``path.zip`` serves where ``path`` itself does not exist.

    Raises:
        UserError: neither exists, or the archive cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        archive = path.with_name(path.name + ".zip")
        if not path.exists() and archive.is_file():
            path = archive
        self.path = path
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._members: dict[str, list[str]] | None = None
        if path.is_file():
            by_name = defaultdict(list)
            for member in self._open().namelist():
                by_name[PurePosixPath(member).name].append(member)
            self._members = dict(by_name)
        elif not path.is_dir():
            raise UserError(f"{path}: no such image folder, and no {archive.name} beside it")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def read(self, file_name: str) -> Tensor:
        """Decode one image.

        Args:
            file_name: as in the json, relative to the folder or the archive.

        Returns:
            (3, H, W) uint8 RGB.

        Raises:
            UserError: the image is absent, truncated or no image.
        """
        raw = self._read_folder(file_name) if self._members is None else self._read_archive(file_name)
        try:
            return _decode(raw)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.path}: {file_name} is truncated or not an image") from error

    def _read_folder(self, file_name: str) -> bytes:
        try:
            return (self.path / file_name).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.path}: image {file_name} is listed but not there") from None
        except OSError as error:
            raise UserError(f"{self.path}: {file_name} cannot be read ({error.strerror})") from error

    def _read_archive(self, file_name: str) -> bytes:
        member = self._member(file_name)
        try:
            return self._open().read(member)
        except (OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path}: {file_name} cannot be read from the archive") from error

    def _member(self, file_name: str) -> str:
        assert self._members is not None
        candidates = self._members.get(PurePosixPath(file_name).name, [])
        for exact in (file_name, f"{self.path.stem}/{file_name}"):
            if exact in candidates:
                return exact
        found = [member for member in candidates if member.endswith("/" + file_name)]
        if not found:
            raise UserError(f"{self.path}: image {file_name} is listed but not there")
        if len(found) > 1:
            raise UserError(f"{self.path}: {file_name} could be {found[0]} or {found[1]}")
        return found[0]

    def _open(self) -> zipfile.ZipFile:
        # A handle from before a fork shares its file position with the parent, hence the process id.
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = os.getpid(), zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.path}: not a readable zip archive") from error
        return self._archive[1]


def _decode(raw: bytes) -> Tensor:
    """(3, H, W) uint8 RGB from an image file's bytes.

    Pillow, since torchvision's own decoders are on their way out and give the same pixels no faster.
    """
    image: Image.Image = Image.open(io.BytesIO(raw))
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey where it should scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return pil_to_tensor(image.convert("RGB"))
