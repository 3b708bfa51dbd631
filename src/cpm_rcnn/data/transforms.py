"""Augmentations: transforms from a stored image and its objects to the input of the network.

An augmentation is any callable ``(image, target, rng) -> (image, target)``, see :class:`Augmentation`. A data set
applies a list of them in order.

None of them keeps random state. ``rng`` is derived from the seed and the sample number (:func:`sample_rng`), so
neither the number of workers nor resuming a run changes what is drawn for a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.random import Generator, Philox
from torch import Tensor
from torchvision.transforms.v2 import functional

from cpm_rcnn.boxes import BoxConvention

Target = dict[str, Any]


class Augmentation(Protocol):
    """What :class:`~cpm_rcnn.data.CocoDataset` expects of an augmentation."""

    def __call__(self, image: Tensor, target: Target, rng: Generator) -> tuple[Tensor, Target]:
        """Transform an image together with its objects; the arguments are not modified.

        Args:
            image: (3, H, W) uint8 RGB.
            target: one entry per property of the N objects, in the same order: ``boxes`` (N, 4) float32 xyxy in pixels
                of ``image``, ``labels`` (N,) int64, and entries that earlier augmentations added. An augmentation that
                removes objects must remove them from all entries (:func:`select_objects`).
            rng: the only source of randomness. It is shared by all augmentations of the list, so an augmentation
                that draws numbers changes the numbers that later ones draw.

        Returns:
            The new image (3, h, w) uint8 and its target.
        """


def sample_rng(seed: int, sample_number: int) -> Generator:
    """The random number generator of one sample of a run.

    Philox is counter-based: the generator of any sample is available in any process without drawing the earlier ones.

    Args:
        seed: random seed of the run, at least 0.
        sample_number: number of samples before this one in the run.
    """
    return Generator(Philox(key=[seed, sample_number]))


def uniform(rng: Generator, low: float = 0.0, high: float = 1.0) -> float:
    """A random number from ``low`` to ``high``, both inclusive.

    Drawn from the raw output of the bit generator: numpy does not promise that the methods of ``Generator`` return the
    same numbers in all versions.
    """
    return low + (high - low) * (rng.bit_generator.random_raw() / 2**64)


def choose(rng: Generator, count: int) -> int:
    """A random number of 0, ..., ``count - 1``."""
    # uniform() can return 1.0, which would be one past the end.
    return min(int(uniform(rng) * count), count - 1)


def select_objects(target: Target, keep: Tensor) -> Target:
    """The entries of the objects where ``keep`` (N,) bool is True."""
    return {name: value[keep] for name, value in target.items()}


@dataclass(frozen=True)
class RandomResize:
    """Resize to a random length of the shorter side from a list, with equal probabilities.

    Attributes:
        short_sides: lengths of the shorter side in pixels, of which one is drawn.
        max_size: maximum length of the longer side in pixels.
        rounding: see :func:`network_size`.
    """

    short_sides: Sequence[int]
    max_size: int
    rounding: str = "nearest"

    def draw(self, rng: Generator) -> int:
        """A random length of the shorter side in pixels."""
        return self.short_sides[choose(rng, len(self.short_sides))]

    def __call__(self, image: Tensor, target: Target, rng: Generator) -> tuple[Tensor, Target]:
        """See :class:`Augmentation`."""
        return _resize(image, target, self.draw(rng), self.max_size, self.rounding)


@dataclass(frozen=True)
class RandomFlip:
    """Random horizontal flip.

    Attributes:
        probability: probability of a flip, 0 to 1.
        convention: box coordinate convention.
    """

    probability: float
    convention: BoxConvention

    def draw(self, rng: Generator) -> bool:
        """A random decision whether to flip."""
        return uniform(rng) < self.probability

    def __call__(self, image: Tensor, target: Target, rng: Generator) -> tuple[Tensor, Target]:
        """See :class:`Augmentation`."""
        if not self.draw(rng):
            return image, target
        image, boxes = flip(image, target["boxes"], self.convention)
        return image, target | {"boxes": boxes}


@dataclass(frozen=True)
class Resize:
    """Resize to a fixed length of the shorter side.

    Attributes:
        short_side: length of the shorter side in pixels; None keeps the size of every image.
        max_size: maximum length of the longer side in pixels; not used if ``short_side`` is None.
    """

    short_side: int | None
    max_size: int

    def __call__(self, image: Tensor, target: Target, rng: Generator) -> tuple[Tensor, Target]:
        """See :class:`Augmentation`."""
        return (image, target) if self.short_side is None else _resize(image, target, self.short_side, self.max_size)


def network_size(size: tuple[int, int], short_side: int, max_size: int, rounding: str = "nearest") -> tuple[int, int]:
    """Size (height, width) in pixels after resizing with the aspect ratio kept.

    Args:
        size: (height, width) of the original image in pixels.
        short_side: length of the shorter side in pixels; it becomes smaller if the longer side would exceed
            ``max_size``.
        max_size: maximum length of the longer side in pixels.
        rounding: ``nearest``, or ``down`` to drop the fraction of a pixel.
    """
    height, width = size
    if rounding == "down":
        # In whole numbers: a rounding error of the scale would cost a pixel.
        short, long = min(size), max(size)
        num, den = (short_side, short) if short_side * long <= max_size * short else (max_size, long)
        return max(height * num // den, 1), max(width * num // den, 1)
    scale = min(short_side / min(height, width), max_size / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def resize(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image and its boxes, bilinear with antialiasing.

    Args:
        image: (3, H, W) uint8.
        boxes: (N, 4) float32 in pixels of ``image``.
        size: the new (height, width) in pixels.

    Returns:
        The image (3, height, width) uint8, and the boxes (N, 4) scaled by the exact ratio of the rounded sizes.
    """
    height, width = image.shape[-2:]
    ratio_y, ratio_x = size[0] / height, size[1] / width
    resized = functional.resize(image, list(size), antialias=True)
    return resized, boxes * torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y], dtype=boxes.dtype)


def flip(image: Tensor, boxes: Tensor, convention: BoxConvention) -> tuple[Tensor, Tensor]:
    """Flip an image (3, H, W) and its boxes (N, 4) horizontally."""
    return image.flip(-1), convention.flip(boxes, image.shape[-1])


def _resize(
    image: Tensor, target: Target, short_side: int, max_size: int, rounding: str = "nearest"
) -> tuple[Tensor, Target]:
    size = network_size((image.shape[-2], image.shape[-1]), short_side, max_size, rounding)
    image, boxes = resize(image, target["boxes"], size)
    return image, target | {"boxes": boxes}
