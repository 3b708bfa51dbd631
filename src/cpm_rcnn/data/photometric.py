"""Random changes of brightness, contrast, saturation and hue."""

from dataclasses import dataclass

from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import functional

from cpm_rcnn.data.transforms import Target, uniform

# SSD's distortion (arXiv 1512.02325, section 2.2), as torchvision's RandomPhotometricDistort has it.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)


@dataclass(frozen=True)
class PhotometricDistortion:
    """Change brightness, contrast, saturation and hue, each with probability 1/2, by torchvision's functions.

    Attributes:
        probability: probability that an image is changed at all, 0 to 1.
    """

    probability: float

    def __call__(self, image: Tensor, target: Target, rng: Generator) -> tuple[Tensor, Target]:
        """See :class:`~cpm_rcnn.data.transforms.Augmentation`."""
        if uniform(rng) >= self.probability:
            return image, target
        for adjust, amounts in (
            (functional.adjust_brightness, _BRIGHTNESS),
            (functional.adjust_contrast, _CONTRAST),
            (functional.adjust_saturation, _SATURATION),
            (functional.adjust_hue, _HUE),
        ):
            if uniform(rng) < 0.5:
                image = adjust(image, uniform(rng, *amounts))
        return image, target
