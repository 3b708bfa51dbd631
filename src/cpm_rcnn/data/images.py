"""Reading images from a folder or from a zip archive, which is not unpacked."""

import io
import os
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from cpm_rcnn.errors import UserError


class ImageSource:
    """Reads images by the file names in a COCO json.

    A zip member is found by its full name, then inside the folder named like the archive (COCO's ``train2017.zip``
    contains ``train2017/000000000009.jpg``), then by the end of its path. The archive is opened once per process, at
    the first read, so that DataLoader workers never share a file position.

    Args:
        path: a folder or a .zip file; if ``path`` does not exist, ``path.zip`` is used.

    Raises:
        UserError: neither exists, or the archive cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        archive = Path(f"{path}.zip")
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
            raise UserError(f"{path}: no such image folder, and no {archive.name} next to it")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def read(self, file_name: str, size: tuple[int, int] | None = None) -> Tensor:
        """Decode one image. Of an animation, the first frame is used.

        The image is rotated as its EXIF orientation says, as viewers and most annotation tools do, unless only the
        stored pixels have the expected ``size``.

        Args:
            file_name: name in the json, relative to the folder or the archive.
            size: (height, width) in pixels that the image must have; None accepts any size.

        Returns:
            (3, H, W) uint8 RGB. Transparency is dropped, 16-bit gray is divided by 256.

        Raises:
            UserError: the image is missing, has another size, exceeds Pillow's limit of 179 million pixels, is
                damaged, or has an unsupported format.
        """
        raw = self._read_folder(file_name) if self._members is None else self._read_archive(file_name)
        try:
            return _decode(raw, size)
        except UserError as error:
            raise UserError(f"{self.path}: {_short(file_name)} {error}") from error.__cause__

    def _read_folder(self, file_name: str) -> bytes:
        try:
            return (self.path / file_name).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.path}: image {_short(file_name)} not found") from None
        except (OSError, ValueError) as error:  # ValueError for names that the file system does not allow
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path}: {_short(file_name)} cannot be read ({reason})") from error

    def _read_archive(self, file_name: str) -> bytes:
        member = self._member(file_name)
        try:
            return self._open().read(member)
        except UserError:
            raise
        except Exception as error:  # damaged and encrypted members raise many types, also those of zlib and lzma
            raise UserError(f"{self.path}: {_short(file_name)} cannot be read from the archive") from error

    def _member(self, file_name: str) -> str:
        assert self._members is not None
        candidates = self._members.get(PurePosixPath(file_name).name, [])
        for exact in (file_name, f"{self.path.stem}/{file_name}"):
            if exact in candidates:
                return exact
        found = [member for member in candidates if member.endswith("/" + file_name)]
        if not found:
            raise UserError(f"{self.path}: image {_short(file_name)} not found")
        if len(found) > 1:
            raise UserError(f"{self.path}: image {_short(file_name)} is ambiguous: {found[0]} or {found[1]}")
        return found[0]

    def _open(self) -> zipfile.ZipFile:
        # A handle opened before a fork shares its file position with the parent, hence the process id.
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = os.getpid(), zipfile.ZipFile(self.path)
            except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.path}: not a readable zip archive") from error
        return self._archive[1]


# Common formats only; for some of the others, Pillow would start a PostScript interpreter.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {_TRANSPOSE[orientation] for orientation in (5, 6, 7, 8)}


def _decode(raw: bytes, size: tuple[int, int] | None) -> Tensor:
    """(3, H, W) uint8 RGB from the bytes of an image file.

    Uses Pillow: torchvision's own decoders are being removed, and return the same pixels no faster.

    Raises:
        UserError: the image is invalid; the message continues a sentence that starts with the image's name.
    """
    if not raw:
        raise UserError("is empty, a file of 0 bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(raw), formats=_FORMATS)
        if size is not None and sorted(size) != sorted(image.size):
            raise UserError(_wrong_size(image.size, size))  # without decoding it
        image.load()
        transpose = _exif_transpose(image)
        upright_size = image.size if transpose in _SWAPS_SIDES else image.size[::-1]
        if size not in (None, upright_size, image.size[::-1]):
            raise UserError(_wrong_size(image.size, size))
        if transpose is not None and size in (None, upright_size):
            image = image.transpose(transpose)
        return rgb_tensor(image)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"is too large to read ({error})") from error
    except Exception as error:  # Pillow's readers raise any type on damaged files
        raise UserError(f"is damaged or not an image in a supported format ({', '.join(_FORMATS)})") from error


def rgb_tensor(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as (3, H, W) uint8 RGB.

    Raises:
        UserError: the range of its pixel values is unknown; the message continues a sentence that starts with its name.
    """
    return pil_to_tensor(_eight_bits(image).convert("RGB"))


def _wrong_size(found: tuple[int, int], size: tuple[int, int]) -> str:
    return f"is {found[0]} x {found[1]} pixels, but the json says {size[1]} x {size[0]}"


def _exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """The transformation that makes the image upright; None if the EXIF orientation is missing, invalid or upright."""
    try:
        return _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are usable even if the EXIF data are damaged
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel. Pillow's own conversion would clip 16-bit gray instead of scaling it.

    Raises:
        UserError: the range of its pixel values is unknown.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 1 << 16:
        raise UserError("has 32 bits per channel with an unknown range; save it with 8 or 16")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _short(file_name: str) -> str:
    return file_name if len(file_name) <= 200 else f"{file_name[:100]}...{file_name[-50:]}"
