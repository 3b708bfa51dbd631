"""Deformable convolution v1: the one door to whichever kernel computes it."""

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d as _torchvision_deform_conv2d


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution with the arguments and semantics of ``torchvision.ops.deform_conv2d``.

    Half-precision inputs are computed in float32 and given back in their own dtype: torchvision's kernel does not
    train in half precision.

    Args:
        input: (N, C_in, H, W).
        offset: (N, 2 * offset_groups * kh * kw, H_out, W_out) pixels, (dy, dx) per tap.
        weight: (C_out, C_in / groups, kh, kw).
        bias: (C_out,).
        stride: vertical and horizontal step.
        padding: zeros added on each side.
        dilation: spacing of the taps.
        mask: (N, offset_groups * kh * kw, H_out, W_out) factor a tap (v2), or None (v1).

    Returns:
        (N, C_out, H_out, W_out) in the dtype of ``input``.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    with torch.autocast(input.device.type, enabled=False):
        output = _torchvision_deform_conv2d(
            input.to(dtype),
            offset.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            stride,
            padding,
            dilation,
            None if mask is None else mask.to(dtype),
        )
    return output.to(input.dtype)


class DeformConv2d(nn.Module):
    """A 3x3-style convolution that predicts the offsets of its own taps; drop-in for an ``nn.Conv2d`` without bias.

    The offset convolution starts at zero, so that the layer starts as the plain convolution (spec section 2).

    Args:
        conv: the convolution to replace; its weight, stride, padding, dilation and groups are taken over.

    Raises:
        ValueError: if ``conv`` has a bias.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.bias is not None:
            raise ValueError("DeformConv2d replaces convolutions without bias only")
        height, width = conv.kernel_size
        kernel_size = (height, width)
        self.weight = conv.weight
        self.stride = (conv.stride[0], conv.stride[1])
        self.padding = (int(conv.padding[0]), int(conv.padding[1]))
        self.dilation = (conv.dilation[0], conv.dilation[1])
        self.conv_offset = nn.Conv2d(
            conv.in_channels, 2 * height * width, kernel_size, self.stride, self.padding, self.dilation
        )
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_out, H_out, W_out) from ``input`` (N, C_in, H, W)."""
        offset = self.conv_offset(input)
        return deform_conv2d(input, offset, self.weight, None, self.stride, self.padding, self.dilation)
