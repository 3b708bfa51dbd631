"""From an image as stored to an image as trained or tested on: resize and flip, together with its boxes.

Nothing here keeps random state. What is drawn for a training sample depends on the seed and on the sample's number
in the run alone, so neither the number of workers nor a resumed run changes it.
"""

from dataclasses import dataclass

import torch
from numpy.random import Philox
from torch import Tensor
from torchvision.transforms.v2 import functional

from cpm_rcnn.boxes import CONTINUOUS, BoxConvention


def network_size(size: tuple[int, int], short_side: int, max_size: int) -> tuple[int, int]:
    """Size (height, width) with the shorter side at ``short_side``, the longer at most at ``max_size``.

    Args:
        size: (height, width) in pixels of the image as stored; its aspect is kept.
        short_side: pixels of the shorter side, fewer where the longer one would pass its limit.
        max_size: most pixels of the longer side.
    """
    height, width = size
    scale = min(short_side / min(height, width), max_size / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def resize(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image and its boxes, bilinear with antialiasing.

    Args:
        image: (3, H, W) uint8.
        boxes: (N, 4) float32 in pixels of ``image``.
        size: the new (height, width).

    Returns:
        The image (3, height, width) uint8 and the boxes, each scaled by the ratios that rounding left.
    """
    height, width = _size(image)
    ratio_y, ratio_x = size[0] / height, size[1] / width
    resized = functional.resize(image, list(size), antialias=True)
    return resized, boxes * torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y], dtype=boxes.dtype)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def flip(image: Tensor, boxes: Tensor, convention: BoxConvention) -> tuple[Tensor, Tensor]:
    """Mirror an image (3, H, W) and its boxes (N, 4) from left to right."""
    return image.flip(-1), convention.flip(boxes, image.shape[-1])


@dataclass(frozen=True)
class TrainTransform:
    """One of several scales, and a flip, drawn anew for every sample of the run.

    The draw is the Philox generator's output under the key (seed, sample number): counter-based, hence the same in
    any process and reachable without drawing what came before.

    Attributes:
        short_sides: the scales to draw from, each a shorter side in pixels.
        max_size: most pixels of the longer side.
        flip_probability: 0 to 1.
        seed: of the run, at least 0.
        convention: the convention of the boxes.
    """

    short_sides: tuple[int, ...]
    max_size: int
    flip_probability: float
    seed: int
    convention: BoxConvention = CONTINUOUS

    def draw(self, sample_number: int) -> tuple[int, bool]:
        """The shorter side in pixels, and whether to flip, of one sample of the run."""
        scale, mirror = (int(word) / 2**64 for word in Philox(key=[self.seed, sample_number]).random_raw(2))
        # The quotient of a word near 2**64 rounds up to 1.0, which would be one past the last scale.
        index = min(int(scale * len(self.short_sides)), len(self.short_sides) - 1)
        return self.short_sides[index], mirror < self.flip_probability

    def __call__(self, image: Tensor, boxes: Tensor, sample_number: int) -> tuple[Tensor, Tensor]:
        """Image (3, h, w) uint8 and boxes (N, 4) at the drawn size, from those of the file."""
        short_side, mirror = self.draw(sample_number)
        image, boxes = resize(image, boxes, network_size(_size(image), short_side, self.max_size))
        return flip(image, boxes, self.convention) if mirror else (image, boxes)


@dataclass(frozen=True)
class EvalTransform:
    """One scale for all.

    Attributes:
        short_side: shorter side in pixels; None leaves images at their size.
        max_size: most pixels of the longer side; not asked for where ``short_side`` is None.
    """

    short_side: int | None
    max_size: int

    def __call__(self, image: Tensor, boxes: Tensor, sample_number: int) -> tuple[Tensor, Tensor]:
        """Image (3, h, w) uint8 and boxes (N, 4) at network size; ``sample_number`` plays no part."""
        if self.short_side is None:
            return image, boxes
        return resize(image, boxes, network_size(_size(image), self.short_side, self.max_size))
