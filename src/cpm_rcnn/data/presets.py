"""The lists of training augmentations that ``augment`` names."""

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.data.crops import LargeScaleJitter, QuarterTurns, RandomCrop
from cpm_rcnn.data.mixing import CopyPaste, MixingAugmentation, Mosaic
from cpm_rcnn.data.photometric import PhotometricDistortion
from cpm_rcnn.data.settings import DataSettings
from cpm_rcnn.data.transforms import Augmentation, RandomFlip, RandomResize

# An augmentation of a list.
Listed = Augmentation | MixingAugmentation


def training_augmentations(settings: DataSettings, convention: BoxConvention) -> list[Listed]:
    """The augmentations of ``settings.augment``, in the order in which they are applied.

    ``flip`` resizes and flips, as in the paper. ``standard`` resizes by a random scale and cuts, and changes colors.
    ``strong`` also mixes images and cuts more.
    """
    sizes = settings.short_sides, settings.max_size
    turns: list[Listed] = [QuarterTurns(convention)] if settings.quarter_turns else []
    flip = RandomFlip(settings.flip_probability, convention)
    if settings.augment == "flip":
        return [*turns, RandomResize(*sizes, settings.resize_rounding), flip]
    standard: list[Listed] = [
        *turns,
        LargeScaleJitter((0.5, 2.0), *sizes, convention),
        flip,
        PhotometricDistortion(0.5),
    ]
    if settings.augment == "standard":
        return standard
    return [Mosaic(0.3, convention), CopyPaste(0.3, 5, convention), RandomCrop(0.3, 0.3, convention), *standard]
