"""Augmentations that take parts of other training images: mosaic and copy-paste of boxes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.data.crops import MIN_VISIBLE, crop
from cpm_rcnn.data.transforms import Target, choose, resize, select_objects, uniform

# Draws another training image and its objects, from the generator of the sample.
Other = Callable[[Generator], tuple[Tensor, Target]]


class MixingAugmentation(ABC):
    """Base of augmentations that :class:`~cpm_rcnn.data.CocoDataset` gives other images of its split.

    The other images are not augmented. These augmentations come first in a list, where the targets of all images have
    the same entries.
    """

    @abstractmethod
    def __call__(self, image: Tensor, target: Target, rng: Generator, other: Other) -> tuple[Tensor, Target]:
        """As an :class:`~cpm_rcnn.data.transforms.Augmentation`; ``other(rng)`` reads another image."""


@dataclass(frozen=True)
class Mosaic(MixingAugmentation):
    """Divide an image into four parts, and fill three of them with other images.

    Each image is resized, with its aspect ratio kept, until it just covers its part, and cut at a random position. The
    result has the size of the first image.

    Attributes:
        probability: probability of a mosaic, 0 to 1.
        convention: convention of the boxes.
    """

    probability: float
    convention: BoxConvention

    def __call__(self, image: Tensor, target: Target, rng: Generator, other: Other) -> tuple[Tensor, Target]:
        """See :class:`MixingAugmentation`."""
        height, width = image.shape[-2:]
        if uniform(rng) >= self.probability or min(height, width) < 8:
            return image, target
        y, x = (round(side * uniform(rng, 0.3, 0.7)) for side in (height, width))
        parts = [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]
        own = choose(rng, 4)
        mosaic, targets = torch.empty_like(image), []
        for k, (top, left, bottom, right) in enumerate(parts):
            piece = (image, target) if k == own else other(rng)
            cut, objects = self._cover(*piece, (bottom - top, right - left), rng)
            mosaic[:, top:bottom, left:right] = cut
            moved = objects["boxes"] + torch.tensor([left, top, left, top], dtype=torch.float32)
            targets.append(objects | {"boxes": moved})
        return mosaic, {name: torch.cat([each[name] for each in targets]) for name in target}

    def _cover(self, image: Tensor, target: Target, size: tuple[int, int], rng: Generator) -> tuple[Tensor, Target]:
        """A window of ``size`` of the image, resized so that one of its sides just fits."""
        height, width = image.shape[-2:]
        scale = max(size[0] / height, size[1] / width)
        scaled = max(size[0], round(scale * height)), max(size[1], round(scale * width))
        image, boxes = resize(image, target["boxes"], scaled)
        y, x = (choose(rng, total - side + 1) for side, total in zip(size, scaled))
        return crop(image, target | {"boxes": boxes}, (y, x), size, self.convention)


@dataclass(frozen=True)
class CopyPaste(MixingAugmentation):
    """Paste random objects of another image, each with the pixels of its box, at random positions.

    Objects of which a pasted one leaves less than a quarter visible are removed.

    Attributes:
        probability: probability that objects are pasted, 0 to 1.
        max_objects: how many are pasted at most.
        convention: convention of the boxes.
    """

    probability: float
    max_objects: int
    convention: BoxConvention

    def __call__(self, image: Tensor, target: Target, rng: Generator, other: Other) -> tuple[Tensor, Target]:
        """See :class:`MixingAugmentation`."""
        if uniform(rng) >= self.probability:
            return image, target
        source, found = other(rng)
        image = image.clone()
        for _ in range(min(1 + choose(rng, self.max_objects), len(found["boxes"]))):
            row = choose(rng, len(found["boxes"]))
            image, target = self._paste(image, target, source, select_objects(found, torch.tensor([row])), rng)
        return image, target

    def _paste(
        self, image: Tensor, target: Target, source: Tensor, single: Target, rng: Generator
    ) -> tuple[Tensor, Target]:
        """Paste an object into ``image``, which is modified."""
        x1, y1, x2, y2 = single["boxes"][0].tolist()
        extra = self.convention.extra
        left, top = max(math.floor(x1), 0), max(math.floor(y1), 0)
        patch = source[:, top : math.ceil(y2 + extra), left : math.ceil(x2 + extra)]
        height, width = patch.shape[-2:]
        space_y, space_x = image.shape[-2] - height, image.shape[-1] - width
        if min(space_y, space_x) < 0:
            return image, target
        y, x = choose(rng, space_y + 1), choose(rng, space_x + 1)
        image[:, y : y + height, x : x + width] = patch
        covered = torch.tensor([[x, y, x + width - extra, y + height - extra]], dtype=torch.float32)
        target = select_objects(target, 1 - _covered_share(target["boxes"], covered, self.convention) >= MIN_VISIBLE)
        shift = torch.tensor([x - left, y - top, x - left, y - top], dtype=torch.float32)
        single = single | {"boxes": single["boxes"] + shift}
        return image, {name: torch.cat([target[name], single[name]]) for name in target}


def _covered_share(boxes: Tensor, patch: Tensor, convention: BoxConvention) -> Tensor:
    """The part (N,) of each box (N, 4) that a patch (1, 4) covers."""
    overlap = torch.cat([torch.maximum(boxes, patch)[:, :2], torch.minimum(boxes, patch)[:, 2:]], dim=1)
    width, height = convention.sizes(overlap)
    return width.clamp(min=0) * height.clamp(min=0) / convention.area(boxes).clamp(min=1e-6)
