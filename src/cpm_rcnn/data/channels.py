"""Images whose channels or range of values do not fit 8-bit RGB are refused, not read in part."""

from typing import IO

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cpm_rcnn.errors import UserError

_PHOTOMETRIC, _CHANNELS, _EXTRA_CHANNELS = 262, 277, 338  # TIFF tags
_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # channels of gray, RGB, palette, CMYK, YCbCr and Lab
_UNSPECIFIED = 0  # an extra channel that is not alpha
# 16-bit gray is divided by 256. Images with 12 bits or fewer would keep 16 levels at most.
_LEAST_MAXIMUM = 1 << 12


def check_tiff_channels(file: IO[bytes]) -> None:
    """Refuse a TIFF with other channels than those of its color space and alpha, for example infrared.

    Pillow drops such channels or cannot read the image. Files of other formats and damaged ones are not checked.

    Raises:
        UserError: there are such channels; the message continues a sentence that starts with the image's name.
    """
    head = file.read(8)
    try:
        if head[:4] not in (b"II*\0", b"MM\0*"):
            return
        directory = ImageFileDirectory_v2(head)
        file.seek(directory.next)
        directory.load(file)
        channels = int(directory.get(_CHANNELS, 1))
        extra = channels - _COLORS.get(int(directory[_PHOTOMETRIC]), channels)
        kinds = directory.get(_EXTRA_CHANNELS, ())
    except Exception:  # Pillow's reader raises any type on damaged files; they are reported when they are decoded
        return
    finally:
        file.seek(0)
    if extra > 1 or (extra == 1 and _UNSPECIFIED in kinds):
        raise UserError(f"has {channels} channels; only gray and RGB are supported: save the channels to use as RGB")


def check_gray_range(pixels: np.ndarray) -> None:
    """Refuse a 16-bit gray image (H, W) that would be nearly black with 8 bits.

    Raises:
        UserError: its largest value is small; the message continues a sentence that starts with the image's name.
    """
    largest = int(pixels.max())
    if 0 < largest < _LEAST_MAXIMUM:
        raise UserError(
            f"has 16 bits per channel, but values up to {largest} only, which would be nearly black with 8 bits: scale "
            "the values to 0..255 and save it with 8 bits"
        )
