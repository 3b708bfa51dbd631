"""Reading images from a folder or from a zip archive, which is not unpacked. Both may be remote."""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from cpm_rcnn.data.channels import check_gray_range, check_tiff_channels
from cpm_rcnn.data.image_files import image_files, short
from cpm_rcnn.data.jpeg import complete_jpeg, decode_plain_jpeg
from cpm_rcnn.errors import UnavailableError, UserError
from cpm_rcnn.remote.urls import Url

_log = logging.getLogger(__name__)


class ImageSource:
    """Reads images by the file names in a COCO json.

    If there is no file whose name has backslashes, as in jsons that were written on Windows, they are read as slashes.
    A zip member is found by its full name, then inside the folder named like the archive (COCO's ``train2017.zip``
    contains ``train2017/000000000009.jpg``), then by the end of its path. The archive is opened once per process, at
    the first read, so that DataLoader workers never share a file position.

    A remote file is read once and then taken from a local cache (:mod:`cpm_rcnn.remote`); the server is asked once per
    source whether it has changed. Of a remote archive, only the directory and the members are read.

    Args:
        path: a folder or a .zip file; if a local ``path`` does not exist, ``path.zip`` is used.

    Raises:
        UserError: neither exists, or the archive cannot be read.
        UnavailableError: the server of a remote archive refuses or does not answer. Reading a file can also raise it.
    """

    def __init__(self, path: str | Path | Url) -> None:
        self._files = image_files(Path(path) if isinstance(path, str) else path)
        self.path = self._files.path

    def read(
        self,
        file_name: str,
        size: tuple[int, int] | None = None,
        warn: Callable[[str], None] = _log.warning,
    ) -> Tensor:
        """Decode one image; the first frame of an animation.

        The image is rotated as its EXIF orientation says, as viewers and most annotation tools do, unless only the
        stored pixels have the expected ``size``. A JPEG that ends early is read if at most 5% of its pixels are lost
        (:func:`~cpm_rcnn.data.jpeg.complete_jpeg`).

        Args:
            file_name: name in the json, relative to the folder or the archive.
            size: (height, width) in pixels that the image must have; None accepts any size.
            warn: receives a message if the image ends early.

        Returns:
            (3, H, W) uint8 RGB. Transparency is dropped, 16-bit gray is divided by 256.

        Raises:
            UserError: the image is missing, has another size, exceeds Pillow's limit of 179 million pixels, is
                damaged, or has an unsupported format.
        """
        return self.decode(file_name, self.read_bytes(file_name), size, warn)

    def read_bytes(self, file_name: str) -> bytes:
        """The content of an image file.

        Raises:
            UserError: it is missing or cannot be read.
        """
        return self._files.read(file_name)

    def decode(
        self,
        file_name: str,
        raw: bytes,
        size: tuple[int, int] | None = None,
        warn: Callable[[str], None] = _log.warning,
    ) -> Tensor:
        """:meth:`read` of a file whose content ``raw`` was read before."""
        return decode_image(raw, f"{self.path}: {short(file_name)}", size, warn)

    def missing(self, file_names: Sequence[str]) -> dict[int, str]:
        """Which files do not exist, found by listing each folder once; of a remote folder, only the first is asked for.

        Returns:
            From the position of each such name to a phrase that says why it cannot be read.
        """
        return self._files.missing(file_names)

    def header_problem(self, file_name: str, size: tuple[int, int]) -> str | None:
        """Why an existing file cannot be an image of ``size`` (height, width); None if its header is as expected.

        The pixels are decoded only if a JPEG or PNG in a folder does not end as such files do.
        """
        try:
            with self._files.open(file_name) as file:
                _check_header(file, size)
                ends_early = not self._files.is_archive and _ends_early(file)
            if ends_early:
                self.read(file_name, size, warn=lambda message: None)
        except UserError as error:
            message = str(error)
            prefix = f"{self.path}: "
            return message.removeprefix(prefix) if message.startswith(prefix) else f"{short(file_name)} {message}"
        except UnavailableError:
            raise
        except Exception as error:  # of the file system, and any type of a damaged archive
            return f"{short(file_name)} cannot be read ({getattr(error, 'strerror', None) or error})"
        return None

    @contextmanager
    def opened(self, file_name: str) -> Iterator[tuple[Image.Image, Image.Transpose | None]]:
        """An image that is not decoded yet, and the transformation that makes it upright; None if it is upright.

        Raises:
            UserError: the image is missing, damaged, or has an unsupported format, which may show inside the context.
        """
        try:
            with self._files.open(file_name) as file:
                image = _opened(file)
                yield image, _exif_transpose(image)
        except UserError as error:
            message = str(error)
            prefix = f"{self.path}: "
            raise UserError(
                message if message.startswith(prefix) else f"{prefix}{short(file_name)} {message}"
            ) from error
        except UnavailableError:
            raise
        except FileNotFoundError:
            raise UserError(f"{self.path}: image {short(file_name)} not found") from None
        except Exception as error:  # of Pillow's readers, the file system, and any type of a damaged archive
            raise UserError(f"{self.path}: {short(file_name)} {_DAMAGED}") from error


def decode_image(
    raw: bytes,
    label: str,
    size: tuple[int, int] | None = None,
    warn: Callable[[str], None] = _log.warning,
) -> Tensor:
    """:meth:`ImageSource.read` of a file that is in memory.

    Args:
        raw: its content.
        label: its name in messages.
        size: see :meth:`ImageSource.read`.
        warn: see :meth:`ImageSource.read`.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        UserError: see :meth:`ImageSource.read`.
    """
    try:
        image, lost = _decode(raw, size)
    except UserError as error:
        raise UserError(f"{label} {error}") from error.__cause__
    if lost is not None:
        what = f"the last {lost:.1%} of its pixels are lost" if lost else "no pixel is lost"
        warn(f"{label} ends early; {what}")
    return image


# Common formats only; for some of the others, Pillow would start a PostScript interpreter.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_DAMAGED = f"is damaged or not an image in a supported format ({', '.join(_FORMATS)})"

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
SWAPS_SIDES = {_TRANSPOSE[orientation] for orientation in (5, 6, 7, 8)}


def _decode(raw: bytes, size: tuple[int, int] | None) -> tuple[Tensor, float | None]:
    """(3, H, W) uint8 RGB from the bytes of an image file, and the fraction of its pixels that is lost.

    The fraction is None if the file is complete. Pillow decodes everything but upright JPEGs, for which there is a
    faster way to the same pixels.

    Raises:
        UserError: the image is invalid; the message continues a sentence that starts with the image's name.
    """
    if not raw:
        raise UserError("is empty, a file of 0 bytes")
    try:
        image, lost = _opened(io.BytesIO(raw)), None
        if size is not None and sorted(size) != sorted(image.size):
            raise UserError(_wrong_size(image.size, size))  # without decoding it
        if (
            isinstance(image, JpegImageFile)
            and size in (None, image.size[::-1])
            and _exif_transpose(image) is None
            and (pixels := decode_plain_jpeg(raw, image)) is not None
        ):
            return pixels, None
        try:
            image.load()
        except OSError:
            if not isinstance(image, JpegImageFile):
                raise
            image, lost = complete_jpeg(raw)
        transpose = _exif_transpose(image)
        upright_size = image.size if transpose in SWAPS_SIDES else image.size[::-1]
        if size not in (None, upright_size, image.size[::-1]):
            raise UserError(_wrong_size(image.size, size))
        if transpose is not None and size in (None, upright_size):
            image = image.transpose(transpose)
        return rgb_tensor(image), lost
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"is too large to read ({error})") from error
    except Exception as error:  # Pillow's readers raise any type on damaged files
        raise UserError(_DAMAGED) from error


def _opened(file: IO[bytes]) -> Image.Image:
    check_tiff_channels(file)
    return Image.open(file, formats=_FORMATS)


def _check_header(file: IO[bytes], size: tuple[int, int]) -> None:
    """Check what the start of an image file says.

    Raises:
        UserError: as :func:`_decode`.
    """
    try:
        image = _opened(file)
        # Only EXIF data explain swapped sides; some formats keep them after the pixels.
        if image.size[::-1] != size and (image.size != size or _exif_transpose(image) not in SWAPS_SIDES):
            raise UserError(_wrong_size(image.size, size))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"is too large to read ({error})") from error
    except Exception as error:
        if file.seek(0, io.SEEK_END) == 0:
            raise UserError("is empty, a file of 0 bytes") from None
        raise UserError(_DAMAGED) from error


def _ends_early(file: IO[bytes]) -> bool:
    """Whether a file starts as a JPEG or a PNG, but does not end as one."""
    file.seek(0)
    start = file.read(4)
    end = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}.get(start[:2])
    if end is None:
        return False
    # Some cameras and tools append a few bytes.
    file.seek(max(0, file.seek(0, io.SEEK_END) - 64))
    return end not in file.read()


def rgb_tensor(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as (3, H, W) uint8 RGB.

    Raises:
        UserError: the range of its pixel values is unknown; the message continues a sentence that starts with its name.
    """
    return pil_to_tensor(eight_bits(image).convert("RGB"))


def _wrong_size(found: tuple[int, int], size: tuple[int, int]) -> str:
    return f"is {found[0]} x {found[1]} pixels, but the annotations say {size[1]} x {size[0]}"


def _exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """The transformation that makes the image upright; None if the EXIF orientation is missing, invalid or upright."""
    try:
        return _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are usable even if the EXIF data are damaged
        return None


def eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel. Pillow's own conversion would clip 16-bit gray instead of scaling it.

    Raises:
        UserError: the range of its pixel values is unknown.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 1 << 16:
        raise UserError("has 32 bits per channel with an unknown range; save it with 8 or 16")
    check_gray_range(pixels)
    return Image.fromarray((pixels >> 8).astype(np.uint8))
