"""Augmentations that cut or turn images: random crop, large-scale jitter, quarter turns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.data.transforms import Target, choose, flip, network_size, resize, select_objects, uniform

# Of an object that a crop or another object covers, at least this part of its area must remain visible.
MIN_VISIBLE = 0.25


def crop(
    image: Tensor, target: Target, corner: tuple[int, int], size: tuple[int, int], convention: BoxConvention
) -> tuple[Tensor, Target]:
    """Cut a window out of an image.

    Objects are clipped to the window. Those of which less than a quarter of the area remains are removed.

    Args:
        image: (3, H, W) uint8.
        target: its objects.
        corner: (y, x) of the window's first pixel.
        size: (height, width) of the window, which must lie within the image.
        convention: convention of the boxes.
    """
    y, x = corner
    height, width = size
    window = image[:, y : y + height, x : x + width].contiguous()
    moved = target["boxes"] - torch.tensor([x, y, x, y], dtype=torch.float32)
    clipped = convention.clip(moved, torch.tensor(size))
    w, h = convention.sizes(clipped)
    visible = w.clamp(min=0) * h.clamp(min=0)
    kept = (visible > 0) & (visible >= MIN_VISIBLE * convention.area(moved))
    return window, select_objects(target | {"boxes": clipped}, kept)


@dataclass(frozen=True)
class RandomCrop:
    """Cut a random window that contains at least one object whole.

    Attributes:
        probability: probability of a crop, 0 to 1. Images without objects are not cropped.
        min_side: the sides of the window are random parts of the image's, at least this one, above 0 and at most 1.
            They are longer if the object needs it.
        convention: convention of the boxes.
    """

    probability: float
    min_side: float
    convention: BoxConvention

    def __call__(self, image: Tensor, target: Target, rng: Generator) -> tuple[Tensor, Target]:
        """See :class:`~cpm_rcnn.data.transforms.Augmentation`."""
        if uniform(rng) >= self.probability or not len(target["boxes"]):
            return image, target
        whole = image.shape[-2], image.shape[-1]
        sides = [max(1, round(side * uniform(rng, self.min_side))) for side in whole]
        box = _extent(target["boxes"][choose(rng, len(target["boxes"]))], self.convention)
        corner, size = [], []
        for side, total, (first, last) in zip(sides, whole, box):
            side = min(max(side, last - first), total)
            corner.append(_position(rng, side, total, first, last))
            size.append(side)
        return crop(image, target, (corner[0], corner[1]), (size[0], size[1]), self.convention)


@dataclass(frozen=True)
class LargeScaleJitter:
    """Resize to the network's size times a random factor, and cut what exceeds the network's size.

    The window contains as much as fits of one random object. An image that becomes smaller is not padded.

    Attributes:
        scales: the smallest and the largest factor; its logarithm is uniform.
        short_sides: lengths of the shorter side of the network's size in pixels, of which one is drawn.
        max_size: maximum length of the longer side of the network's size in pixels.
        convention: convention of the boxes.
    """

    scales: tuple[float, float]
    short_sides: Sequence[int]
    max_size: int
    convention: BoxConvention

    def __call__(self, image: Tensor, target: Target, rng: Generator) -> tuple[Tensor, Target]:
        """See :class:`~cpm_rcnn.data.transforms.Augmentation`."""
        short_side = self.short_sides[choose(rng, len(self.short_sides))]
        low, high = self.scales
        scale = math.exp(uniform(rng, math.log(low), math.log(high)))
        limit = network_size((image.shape[-2], image.shape[-1]), short_side, self.max_size)
        large = max(1, round(scale * limit[0])), max(1, round(scale * limit[1]))
        image, boxes = resize(image, target["boxes"], large)
        target = target | {"boxes": boxes}
        if scale <= 1:
            return image, target
        spans = (
            _extent(boxes[choose(rng, len(boxes))], self.convention) if len(boxes) else [(0, side) for side in large]
        )
        y, x = (_position(rng, side, total, *span) for side, total, span in zip(limit, large, spans))
        return crop(image, target, (y, x), limit, self.convention)


@dataclass(frozen=True)
class QuarterTurns:
    """Turn an image by 0, 90, 180 or 270 degrees, with equal probabilities.

    Attributes:
        convention: convention of the boxes.
    """

    convention: BoxConvention

    def __call__(self, image: Tensor, target: Target, rng: Generator) -> tuple[Tensor, Target]:
        """See :class:`~cpm_rcnn.data.transforms.Augmentation`."""
        boxes = target["boxes"]
        for _ in range(choose(rng, 4)):
            # Counterclockwise: a horizontal flip, then rows become columns.
            image, boxes = flip(image, boxes, self.convention)
            image, boxes = image.transpose(-1, -2), boxes[:, [1, 0, 3, 2]]
        return image.contiguous(), target | {"boxes": boxes}


def _extent(box: Tensor, convention: BoxConvention) -> list[tuple[int, int]]:
    """The pixels that a box (4,) covers: the first, and the one after the last, of its rows and of its columns."""
    x1, y1, x2, y2 = box.tolist()
    return [(math.floor(a), math.ceil(b + convention.extra)) for a, b in ((y1, y2), (x1, x2))]


def _position(rng: Generator, side: int, total: int, first: int, last: int) -> int:
    """A random first pixel of a window of length ``side`` that contains first..last, or lies inside it."""
    low, high = sorted((last - side, first))
    low, high = max(low, 0), min(high, total - side)
    # Boxes may end at fractions of a pixel at the border of the image.
    return min(max(low, 0), total - side) if low >= high else low + choose(rng, high - low + 1)
