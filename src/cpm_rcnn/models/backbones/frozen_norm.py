"""Frozen BatchNorm folded into the convolution before it.

Frozen BatchNorm multiplies each channel by a constant and adds another. ``norm(conv(x))`` therefore equals the
convolution with the weight times the scales and the shifts as its bias: one product of the size of the weight in place
of two passes over the activations. The gradient of the weight is the same up to rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.ops import DeformConv2dPack
from cpm_rcnn.ops.conv3x3 import Conv3x3, conv3x3


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    """``norm(conv(x))``, computed as one convolution if ``norm`` is a frozen BatchNorm.

    Args:
        x: (B, C_in, H, W).
        conv: a convolution without hooks, because the layer itself is not called.
        norm: the layer after it.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    weight, bias = folded(conv, norm)
    if isinstance(conv, DeformConv2dPack):
        return conv.convolve(x, weight, bias)
    if isinstance(conv, Conv3x3):
        return conv3x3(x, weight, bias)
    assert isinstance(conv, nn.Conv2d)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def folded(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals ``conv`` followed by the frozen BatchNorm ``norm``."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return conv.weight * scale[:, None, None, None], shift if conv.bias is None else shift + conv.bias * scale


@torch.no_grad()
def fold_once(conv: nn.Module, norm: nn.Module) -> None:
    """Replace weight and bias of ``conv`` by those of :func:`folded`, without gradients. ``norm`` must not be used."""
    weight, bias = folded(conv, norm)
    conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
