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
    size: int | None = None,
) -> Tensor:
    """Draw detections and, if given, ground-truth boxes on an image.

    A detection is a solid box in the color of its class with a tag of its name and score. A ground-truth box is dashed
    in black and white. Detections with higher scores are drawn on top of others, and their tags have the better places.

    Args:
        image: uint8 (3, H, W).
        detections: ``boxes`` (N, 4) xyxy in pixels of ``image``, ``scores`` (N,), ``labels`` (N,) in 1..C.
        class_names: the C names; label l is ``class_names[l - 1]``.
        ground_truth: ``boxes`` (M, 4).
        min_score: detections with a lower score are not drawn. A number, or one for each of the C classes.
        size: height of the text in pixels; None: :func:`text_size` of the detections that are drawn.

    Returns:
        uint8 (3, kH, kW) on the CPU, where k is the smallest integer that makes the longer side at least 480 pixels.
    """
    factor = _factor(image)
    canvas = F.to_pil_image(image.cpu())
    canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)

    order = detections["scores"].argsort(descending=True)
    low = detections["scores"].new_tensor(min_score).expand(len(class_names))[detections["labels"] - 1]
    order = order[(detections["scores"] >= low)[order]]
    boxes = [_ordered(box) for box in (detections["boxes"][order] * factor).tolist()]
    scores, labels = detections["scores"][order].tolist(), detections["labels"][order].tolist()
    texts = [f"{class_names[label - 1]} {score:.2f}" for label, score in zip(labels, scores)]
    if size is None:
        size = text_size(image, detections["boxes"][order])
    line = max(2, size // 6)

    if ground_truth is not None:
        for box in (ground_truth["boxes"] * factor).tolist():
            _dashed_rectangle(pen, _ordered(box), width=max(1, line // 2), dash=4 * line)
    for box, label in reversed(list(zip(boxes, labels))):
        pen.rectangle(box, outline=_color(label), width=line)
    font = ImageFont.load_default(size=size)
    tags: list[_Rectangle] = []
    for box, text in zip(boxes, texts):
        tags.append(_tag_place(pen, box, text, font, canvas.size, tags))
    for tag, text, label in reversed(list(zip(tags, texts, labels))):
        _draw_tag(pen, tag, text, _color(label), font)
    return F.pil_to_tensor(canvas)


def text_size(image: Tensor, boxes: Tensor) -> int:
    """The height of the text on the picture that :func:`draw` makes of an image.

    It suits the picture as a whole, but is smaller if the tags would cover small objects.

    Args:
        image: (3, H, W).
        boxes: (N, 4) xyxy in pixels of ``image``, the detections that are drawn.

    Returns:
        The height in pixels.
    """
    factor = _factor(image)
    longer = max(image.shape[-2:]) * factor
    size = longer / 52
    if len(boxes):
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) * factor
        size = min(size, max(longer / 150, sides.median().item() / 6))
    return max(13, round(size))


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


def _factor(image: Tensor) -> int:
    """How many times an image (3, H, W) is enlarged."""
    return -(-_READABLE // max(image.shape[-2:]))


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


def _tag_place(
    pen: ImageDraw.ImageDraw,
    box: _Rectangle,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    taken: Sequence[_Rectangle],
) -> _Rectangle:
    """The place of a tag at an edge of its box, inside the image, that covers as little of other tags as possible."""
    left, _, right, _ = pen.textbbox((0, 0), text, font=font)
    top, bottom, margin = _text_lines(pen, font)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin

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
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _draw_tag(
    pen: ImageDraw.ImageDraw,
    place: _Rectangle,
    text: str,
    color: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
    left, _, _, _ = pen.textbbox((0, 0), text, font=font)
    top, _, margin = _text_lines(pen, font)
    red, green, blue = ImageColor.getrgb(color)[:3]
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 110
    start = (place[0] + margin - left, place[1] + margin - top)
    pen.text(start, text, font=font, fill="black" if bright else "white")


def _text_lines(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> tuple[float, float, int]:
    """Top and bottom of letters with ascender and descender, so that all tags have one height, and the margin."""
    _, top, _, bottom = pen.textbbox((0, 0), "dp", font=font)
    return top, bottom, max(2, round((bottom - top) / 6))


def _overlap(a: _Rectangle, b: _Rectangle) -> float:
    """The area that two rectangles have in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
