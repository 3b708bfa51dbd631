"""The input formats of pretrained backbones: channel order, pixel range, and the placement of strides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpm_rcnn.errors import ArgumentError, shown
from cpm_rcnn.settings import Settings, architecture, choice, flag, list_of, number


def _number(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError(argument, f"={shown(value)}: must be a finite number")


def _positive(argument: str, value: Any) -> None:
    _number(argument, value)
    if value <= 0:
        raise ArgumentError(argument, f"={shown(value)}: must be above 0")


@dataclass(frozen=True)
class InputFormat(Settings):
    """The input that a backbone expects. A uint8 value v becomes ``(v / scale - mean) / std``.

    Attributes:
        order: channel order, ``rgb`` or ``bgr``.
        scale: divisor of the uint8 values before mean and std are applied: 255 for a range of 0..1, 1 for 0..255.
        mean: mean of each channel, in the backbone's channel order and range.
        std: standard deviation of each channel, likewise.
        stride_in_1x1: whether a ResNet's bottlenecks have their stride on the first 1x1 convolution (Caffe) and not on
            the 3x3. A ResNeXt always has it on the 3x3.
    """

    order: str = architecture(check=choice("rgb", "bgr"))
    scale: float = architecture(check=number(1))
    mean: Sequence[float] = architecture(check=list_of(_number, 3))
    std: Sequence[float] = architecture(check=list_of(_positive, 3))
    stride_in_1x1: bool = architecture(False, check=flag)


# torchvision's ImageNet weights, and most of timm's.
RGB = InputFormat("rgb", 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Weights trained with Caffe, which the CPM R-CNN release starts from.
CAFFE = InputFormat("bgr", 1, (102.9801, 115.9465, 122.7717), (1, 1, 1), stride_in_1x1=True)

NAMED_FORMATS = {"rgb": RGB, "caffe": CAFFE}
