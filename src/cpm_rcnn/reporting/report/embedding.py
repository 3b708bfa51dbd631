"""Pictures of a report as JPEG data URIs."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cpm_rcnn.errors import UnavailableError, UserError

OpenImage = Callable[[str], np.ndarray]
Box = tuple[float, float, float, float]

_LONGEST = 640  # pixels of a whole image
_LONGEST_CROP = 400
_QUALITY = 78


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        view: the part of the image that it shows: x, y, width and height in pixels of the image.
        uri: the data URI; empty if the image cannot be read.
        error: why it cannot be read.
    """

    view: Box
    uri: str = ""
    error: str = ""


def embed(entries: Iterable[dict[str, Any]], views: Iterable[Box], open_image: OpenImage | None) -> list[Picture]:
    """The pictures of parts of images. Each image is opened once, and equal pictures are encoded once.

    Args:
        entries: one dict per picture with ``file_name``, ``width`` and ``height``.
        views: which part of the image each picture shows.
        open_image: returns an image, uint8 RGB (H, W, 3), and may raise ``UserError``. None embeds no pictures.
    """
    wanted: dict[str, dict[Box, list[int]]] = {}
    pictures: list[Picture] = []
    for number, (entry, view) in enumerate(zip(entries, views, strict=True)):
        whole = (0.0, 0.0, float(entry["width"]), float(entry["height"]))
        pictures.append(Picture(view, error="Pictures are not included."))
        wanted.setdefault(entry["file_name"], {}).setdefault(whole if view == whole else view, []).append(number)
    if open_image is None:
        return pictures
    for file_name, parts in wanted.items():
        try:
            image = Image.fromarray(open_image(file_name))
        except (UserError, UnavailableError) as error:
            for numbers in parts.values():
                for number in numbers:
                    pictures[number] = Picture(pictures[number].view, error=f"The picture could not be read: {error}")
            continue
        for view, numbers in parts.items():
            picture = Picture(view, _uri(image, view))
            for number in numbers:
                pictures[number] = picture
    return pictures


def whole_view(entry: dict[str, Any]) -> Box:
    """All of an image."""
    return 0.0, 0.0, float(entry["width"]), float(entry["height"])


def crop_view(entry: dict[str, Any], boxes: Sequence[Box]) -> Box:
    """The part of an image around boxes, with a margin and in whole pixels.

    It has the proportions 4 to 3 where the image is large enough, and at least a sixth of the image's longer side.

    Args:
        entry: a dict with ``width`` and ``height`` of the image.
        boxes: x, y, width and height in pixels.
    """
    limits = int(entry["width"]), int(entry["height"])
    starts = [min(box[i] for box in boxes) for i in (0, 1)]
    ends = [max(box[i] + box[i + 2] for box in boxes) for i in (0, 1)]
    height = max(1.5 * (ends[0] - starts[0]) * 3 / 4, 1.5 * (ends[1] - starts[1]), max(limits) / 8, 36.0)
    view = []
    for start, end, length, limit in zip(starts, ends, (height * 4 / 3, height), limits):
        size = min(limit, round(length))
        first = round((start + end - size) / 2)
        view.append((float(max(0, min(first, limit - size))), float(size)))
    (x, width), (y, height) = view
    return x, y, width, height


def _uri(image: Image.Image, view: Box) -> str:
    x, y, width, height = view
    box = (int(x), int(y), max(int(x) + 1, int(x + width)), max(int(y) + 1, int(y + height)))
    whole = box[:2] == (0, 0) and box[2] >= image.width and box[3] >= image.height
    part = image if whole else image.crop(box)
    longest = _LONGEST if whole else _LONGEST_CROP
    part = part.copy()
    part.thumbnail((longest, longest), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    part.convert("RGB").save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
