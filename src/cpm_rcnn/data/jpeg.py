"""JPEG files: a fast decoder for most of them, and files whose last bytes are missing."""

import io

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from cpm_rcnn.errors import UserError

try:
    from simplejpeg import decode_jpeg
except ImportError:  # there is no wheel for this platform
    decode_jpeg = None


def has_fast_decoder() -> bool:
    """Whether simplejpeg is installed; without it, Pillow decodes all JPEGs to the same pixels."""
    return decode_jpeg is not None


def decode_plain_jpeg(raw: bytes, header: JpegImageFile) -> Tensor | None:
    """The pixels of an ordinary JPEG, equal to those of Pillow, by simplejpeg, which copies them less often.

    simplejpeg contains libjpeg-turbo, as Pillow's wheels do. Unusual files and those that it complains about are left
    to Pillow, which may be able to read them, or raises the error.

    Args:
        raw: the content of the file.
        header: the same file opened by Pillow; its pixels need not be loaded.

    Returns:
        (3, H, W) uint8 RGB, not rotated by the EXIF orientation. None if simplejpeg is not installed, the file is CMYK
        or holds several pictures, or simplejpeg cannot decode it without a warning.
    """
    # The exact type, because a file with several pictures is a subclass.
    if decode_jpeg is None or type(header) is not JpegImageFile or header.mode not in ("RGB", "L"):
        return None
    try:
        pixels = decode_jpeg(raw, "RGB")
    except ValueError:  # also for what libjpeg only warns of
        return None
    if pixels.shape[1::-1] != header.size:  # a damaged header, which the two libraries read in different ways
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


# A JPEG that has lost more than this fraction of its pixels is an error.
_LARGEST_LOSS = 0.05
_END_OF_IMAGE = b"\xff\xd9"


def complete_jpeg(raw: bytes) -> tuple[Image.Image, float]:
    """A JPEG whose last bytes are missing, and the fraction of its pixels that is lost.

    Decodes it with an end marker added, as other programs do. (Pillow's own option for that is a global variable, which
    threads would have to share.) The lost pixels are those that change if random data follow instead of the marker, and
    all after them.

    Raises:
        UserError: more than 5% of the pixels are lost, or a whole scan; the message continues a sentence.
        OSError: the data are damaged in another way.
    """
    raw = raw.rstrip(b"\xff")  # which would make a marker of the byte that follows
    image = _opened(raw + _END_OF_IMAGE)
    image.load()
    if not _has_all_scans(raw):
        raise UserError("ends early, before the last scan of its pixels")
    pixels = np.asarray(image)
    changed = np.zeros(pixels.shape[:2], dtype=bool)
    for seed in range(3):
        # No 0xff, which starts a marker. 0.25 bytes per pixel are enough for more than the largest loss.
        noise = np.random.default_rng(seed).integers(0, 255, 1024 + changed.size // 4, dtype=np.uint8).tobytes()
        other = _opened(raw + noise + _END_OF_IMAGE)
        other.load()
        difference = np.asarray(other) != pixels
        changed |= difference.any(axis=2) if difference.ndim == 3 else difference
    # Pixels are stored in blocks of 8 x 8, or of more where colors have a lower resolution.
    assert isinstance(image, JpegImageFile)
    block = 8 * max(vertical for _, _, vertical, *_ in image.layer)
    lost = _pixels_from_first(changed, block) / changed.size
    if lost > _LARGEST_LOSS:
        raise UserError(f"ends early; {lost:.1%} of its pixels are lost (at most 5% are allowed)")
    return image, lost


def _pixels_from_first(changed: np.ndarray, block: int) -> int:
    """How many pixels follow the first True of ``changed`` (H, W) bool in the order of rows of blocks."""
    rows = np.flatnonzero(changed.any(axis=1))
    if not rows.size:
        return 0
    height, width = changed.shape
    # Smoothing can change one row of the blocks above.
    top = (rows[0] + 1) // block * block
    bottom = min(top + block, height)
    columns = np.flatnonzero(changed[top:bottom].any(axis=0))
    return int((bottom - top) * (width - columns[:1].sum()) + (height - bottom) * width)


def _has_all_scans(raw: bytes) -> bool:
    """Whether a JPEG has started the scans that complete every coefficient of every component.

    A progressive JPEG stores the whole image several times, each time with more detail.
    """
    components: set[int] = set()
    complete: dict[int, set[int]] = {}
    position = 2
    while (position := raw.find(b"\xff", position)) >= 0 and position + 4 <= len(raw):
        kind = raw[position + 1]
        if kind == 0xFF:  # padding
            position += 1
            continue
        if kind in (0x00, 0x01) or 0xD0 <= kind <= 0xD8:  # no marker, or one without content
            position += 2
            continue
        content = raw[position + 4 : position + 2 + int.from_bytes(raw[position + 2 : position + 4], "big")]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC) and len(content) > 5:
            components = set(content[6 : 6 + 3 * content[5] : 3])
        elif kind == 0xDA and len(content) >= 4:
            first, last, precision = content[-3:]
            if precision & 15 == 0:  # the lowest bit of these coefficients
                for component in content[1 : 1 + 2 * content[0] : 2]:
                    complete.setdefault(component, set()).update(range(first, last + 1))
        position += 4 + len(content)
    return bool(components) and all(complete.get(component) == set(range(64)) for component in components)


def _opened(raw: bytes) -> Image.Image:
    return Image.open(io.BytesIO(raw), formats=("JPEG",))
