"""Drawing of boxes on images."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cpm_rcnn.errors import UserError

# A class has the same color in every picture: label l has entry l - 1, modulo the number of entries.
_PALETTE = (
    *("#ff595e", "#1e96fc", "#ffca3a", "#52d273", "#c77dff", "#ff924c", "#00d5d5", "#ff70c5"),
    *("#b8e04f", "#8d99ff", "#d4a373", "#2ec4a0", "#e63c9b", "#f7ef81", "#6fa8dc", "#ffb3a7"),
)
_BACKGROUND = (24, 26, 30)
# Images whose longer side is shorter than this are enlarged first, so that text is readable.
_READABLE = 480

_Rectangle = tuple[float, float, float, float]


def draw(
    image: Tensor,
    detections: dict[str, Tensor],
    class_names: Sequence[str],
    ground_truth: dict[str, Tensor] | None = None,
    min_score: float | Sequence[float] = 0.3,
) -> Tensor:
    """Draw detections and, if given, ground-truth boxes on an image.

    A detection is a solid box in the color of its class with a tag of its name and score. A ground-truth box is dashed
    in black and white. Detections with higher scores are drawn on top of others.

    Args:
        image: uint8 (3, H, W).
        detections: ``boxes`` (N, 4) xyxy in pixels of ``image``, ``scores`` (N,), ``labels`` (N,) in 1..C.
        class_names: the C names; label l is ``class_names[l - 1]``.
        ground_truth: ``boxes`` (M, 4).
        min_score: detections with a lower score are not drawn. A number, or one for each of the C classes.

    Returns:
        uint8 (3, kH, kW) on the CPU, where k is the smallest integer that makes the longer side at least 480 pixels.
    """
    longer = max(image.shape[-2:])
    factor = -(-_READABLE // longer)
    canvas = F.to_pil_image(image.cpu())
    canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(longer * factor / 320))
    font = ImageFont.load_default(size=max(13, round(longer * factor / 52)))

    if ground_truth is not None:
        for box in (ground_truth["boxes"] * factor).tolist():
            _dashed_rectangle(pen, _ordered(box), width=max(1, line // 2), dash=4 * line)

    order = detections["scores"].argsort()
    low = detections["scores"].new_tensor(min_score).expand(len(class_names))[detections["labels"] - 1]
    order = order[(detections["scores"] >= low)[order]]
    boxes = [_ordered(box) for box in (detections["boxes"][order] * factor).tolist()]
    scores = detections["scores"][order].tolist()
    labels = detections["labels"][order].tolist()
    for box, label in zip(boxes, labels):
        pen.rectangle(box, outline=_color(label), width=line)
    tags: list[_Rectangle] = []
    for box, score, label in reversed(list(zip(boxes, scores, labels))):
        text = f"{class_names[label - 1]} {score:.2f}"
        tags.append(_draw_tag(pen, box, text, _color(label), font, canvas.size, tags))
    return F.pil_to_tensor(canvas)


def sheet(pictures: Sequence[Tensor], columns: int) -> Tensor:
    """Arrange pictures in rows on one dark sheet, each in the middle of its cell.

    Args:
        pictures: at least one uint8 (3, H, W) of any size; the largest height and width are the size of a cell.
        columns: pictures per row.

    Returns:
        uint8 (3, H', W').
    """
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_height = max(picture.shape[1] for picture in pictures)
    cell_width = max(picture.shape[2] for picture in pictures)
    gap = max(6, cell_width // 80)
    background = torch.tensor(_BACKGROUND, dtype=torch.uint8)[:, None, None]
    grid = background.repeat(1, rows * (cell_height + gap) + gap, columns * (cell_width + gap) + gap)
    for k, picture in enumerate(pictures):
        row, column = divmod(k, columns)
        _, height, width = picture.shape
        top = gap + row * (cell_height + gap) + (cell_height - height) // 2
        left = gap + column * (cell_width + gap) + (cell_width - width) // 2
        grid[:, top : top + height, left : left + width] = picture.cpu()
    return grid


def save(picture: Tensor, path: str | PathLike[str]) -> None:
    """Write a picture, uint8 (3, H, W), in the format of the file suffix; missing folders are created.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        F.to_pil_image(picture.cpu()).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot write the picture: {error}") from error


def _color(label: int) -> str:
    return _PALETTE[(label - 1) % len(_PALETTE)]


def _ordered(box: Sequence[float]) -> _Rectangle:
    """The box in whole pixels; corners are ordered, since Pillow refuses to draw inverted boxes."""
    x1, y1, x2, y2 = (round(value) for value in box)
    return float(x1), float(y1), float(max(x1, x2)), float(max(y1, y2))


def _dashed_rectangle(pen: ImageDraw.ImageDraw, box: _Rectangle, width: int, dash: int) -> None:
    """White dashes on a black line: visible on any image, and different from all class colors."""
    x1, y1, x2, y2 = box
    pen.rectangle(box, outline="black", width=width)
    for x in range(round(x1), round(x2), 2 * dash):
        for side in (y1, y2 - width + 1):
            pen.rectangle((x, side, min(x + dash, x2), side + width - 1), fill="white")
    for y in range(round(y1), round(y2), 2 * dash):
        for side in (x1, x2 - width + 1):
            pen.rectangle((side, y, side + width - 1, min(y + dash, y2)), fill="white")


def _draw_tag(
    pen: ImageDraw.ImageDraw,
    box: _Rectangle,
    text: str,
    color: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    taken: Sequence[_Rectangle],
) -> _Rectangle:
    """Draw a tag inside the image, if possible where it covers no other tag, and return its rectangle."""
    left, _, right, _ = pen.textbbox((0, 0), text, font=font)
    # The height of letters with ascender and descender, so that all tags have the same height.
    _, tall_top, _, tall_bottom = pen.textbbox((0, 0), "dp", font=font)
    margin = max(2, round((tall_bottom - tall_top) / 6))
    width, height = right - left + 2 * margin, tall_bottom - tall_top + 2 * margin

    x1, y1, x2, y2 = box
    places: list[_Rectangle] = []
    for left_edge, top_edge in (
        (x1, y1 - height),
        (x1, y1),
        (x1, y2),
        (x2 - width, y1 - height),
        (x2 - width, y2 - height),
    ):
        x = max(0, min(left_edge, size[0] - width))
        y = max(0, min(top_edge, size[1] - height))
        places.append((x, y, x + width, y + height))
    free = (place for place in places if not any(_overlap(place, other) for other in taken))
    place = next(free, places[0])

    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
    red, green, blue = ImageColor.getrgb(color)[:3]
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 110
    pen.text(
        (place[0] + margin - left, place[1] + margin - tall_top),
        text,
        font=font,
        fill="black" if bright else "white",
    )
    return place


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
