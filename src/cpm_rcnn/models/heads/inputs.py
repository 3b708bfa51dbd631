"""The properties of the rest of a model that a head depends on."""

from collections.abc import Sequence
from dataclasses import dataclass

from cpm_rcnn.boxes import BoxConvention


@dataclass(frozen=True)
class HeadInputs:
    """The properties of the rest of the model that a head depends on.

    Attributes:
        channels: number of channels of each level of the feature pyramid.
        strides: strides in pixels of the levels that the head pools from, P2 first.
        num_classes: number of foreground classes C.
        convention: the box coordinate convention.
    """

    channels: int
    strides: Sequence[int]
    num_classes: int
    convention: BoxConvention
