"""Deformable convolution, v1 and v2: the function and its layers.

The function checks its arguments; ``deform_conv_op.py`` registers the operator that it calls, and
``deform_conv_backends.py`` chooses the implementation.
"""

import operator
from collections.abc import Iterable
from contextlib import nullcontext
from typing import SupportsIndex

import torch
import torchvision.ops
from torch import Tensor, nn

from cpm_rcnn.ops.deform_conv_op import deform_conv2d_op


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution with the arguments and semantics of ``torchvision.ops.deform_conv2d``.

    Each kernel tap of an output pixel samples the input at its regular position plus its offset. Samples are
    interpolated bilinearly, and the input is zero outside its borders.

    The CPU kernel supports float32, float64 and bfloat16; the GPU kernel supports float32, bfloat16 and float16. All
    other cases use torchvision's operator. Sums are computed in float64 for float64 inputs and in float32 otherwise.
    Offsets and mask may be float32 with a half-precision input.

    Under autocast, tensors of any floating-point dtypes are accepted. Input, weight, bias and mask are converted to the
    autocast dtype. Offsets keep this dtype and float32, and are converted to float32 otherwise. With a float64 input,
    everything is converted to float64 instead.

    A NaN or infinite offset makes its sample NaN: in the output, the pixel is NaN in all channels that read the sample;
    in the gradients, the two offsets of the tap, its mask factor, and the weights that multiply the sample are NaN. The
    input's gradient omits the sample. See docs/deform_conv.md for masks and inputs that are not finite.

    Args:
        input: (N, C_in, H, W) floating-point tensor.
        offset: (N, 2 * offset_groups * kh * kw, H_out, W_out) tensor with one (dy, dx) pair per tap, in input pixels.
        weight: (C_out, C_in / groups, kh, kw) tensor.
        bias: (C_out,) tensor, or None.
        stride: vertical and horizontal stride, or one number for both.
        padding: number of zero rows and columns added on each side of the input, or one number for both.
        dilation: vertical and horizontal spacing between kernel taps, or one number for both.
        mask: (N, offset_groups * kh * kw, H_out, W_out) tensor with one factor per tap (v2), or None (v1).

    Returns:
        (N, C_out, H_out, W_out) tensor with the dtype and memory format of ``input``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
    """
    if torch.compiler.is_exporting():
        return torchvision.ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    device = input.device.type
    # Devices without autocast, such as meta, raise an error when asked whether it is enabled.
    has_autocast = torch.amp.is_autocast_available(device)
    if has_autocast and torch.is_autocast_enabled(device):
        double = input.dtype is torch.float64
        dtype = torch.float64 if double else torch.get_autocast_dtype(device)
        input, weight = (x.to(dtype) if x.is_floating_point() else x for x in (input, weight))
        bias, mask = (x.to(dtype) if x is not None and x.is_floating_point() else x for x in (bias, mask))
        if offset.is_floating_point() and (double or offset.dtype not in (dtype, torch.float32)):
            offset = offset.to(torch.float64 if double else torch.float32)
    geometry = (_pair(stride), _pair(padding), _pair(dilation))
    _check(input, offset, weight, bias, *geometry, mask)
    with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
        output = deform_conv2d_op(input, offset, mask, weight, *geometry)
        return output if bias is None else output + bias[:, None, None]


class DeformConv2d(torchvision.ops.DeformConv2d):
    """``torchvision.ops.DeformConv2d``, computed by :func:`deform_conv2d`. The caller provides offsets and mask."""

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute (N, C_out, H_out, W_out) from ``input`` (N, C_in, H, W).

        See :func:`deform_conv2d` for ``offset`` and ``mask``.
        """
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


class DeformConv2dPack(DeformConv2d):
    """A deformable convolution that predicts its own offsets, and optionally its mask, from its input.

    The convolution that predicts them is initialized to zero. The layer therefore starts as a plain convolution
    (docs/method.md section 2). If modulated, its output starts at half that value, because every mask factor is
    sigmoid(0) = 0.5.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: kernel size, also of the convolution that predicts the offsets.
        stride: stride of both convolutions.
        padding: zero padding of both convolutions.
        dilation: dilation of both convolutions.
        groups: number of groups of the deformable convolution. The other convolution has one group.
        bias: whether the deformable convolution has a bias.
        offset_groups: number of groups of input channels that have separate offsets.
        modulated: whether the layer also predicts one mask factor in (0, 1) per tap (v2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        offset_groups: int = 1,
        modulated: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.modulated = modulated
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            in_channels,
            (3 if modulated else 2) * offset_groups * taps,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "DeformConv2dPack":
        """Return a v1 layer with the geometry and groups of ``conv``. It shares the weight and bias of ``conv``."""
        (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
        padding = (int(conv.padding[0]), int(conv.padding[1]))
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            (kh, kw),
            (sh, sw),
            padding,
            (dh, dw),
            conv.groups,
            conv.bias is not None,
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Compute (N, C_out, H_out, W_out) from ``input`` (N, C_in, H, W)."""
        return self.convolve(input, self.weight, self.bias)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As :meth:`forward`, with another weight and bias; offsets and mask are predicted by the layer."""
        offset, mask = self.conv_offset(input), None
        if self.modulated:
            taps = offset.shape[1] // 3
            offset, mask = offset[:, : 2 * taps], offset[:, 2 * taps :].sigmoid()
        return deform_conv2d(input, offset, weight, bias, self.stride, self.padding, self.dilation, mask)


def _pair(value: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, int]:
    """Return a pair of ints from one integer, which may be numpy's, or from two."""
    values = tuple(value) if isinstance(value, Iterable) else (value, value)
    _require(len(values) == 2, f"{values} must be one number or two")
    return operator.index(values[0]), operator.index(values[1])


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> None:
    """Raise RuntimeError, as torchvision does, unless shapes, dtypes and devices match."""
    named = {"input": input, "offset": offset, "weight": weight, "mask": mask, "bias": bias}
    tensors = {name: x for name, x in named.items() if x is not None}
    for name, x in tensors.items():
        _require(x.device == input.device, f"{name} is on {x.device} but input is on {input.device}")
        _require(x.is_floating_point(), f"{name} is {x.dtype}: must be a floating-point dtype")
        _require(name == "bias" or x.ndim == 4, f"{name} has {x.ndim} dimensions: must have 4")
        # float32 offsets and masks are allowed with a half-precision input: half precision is coarse for sampling
        # positions.
        finer = name in ("offset", "mask") and x.dtype is torch.float32 and input.itemsize == 2
        _require(x.dtype is input.dtype or finer, f"{name} is {x.dtype} but input is {input.dtype}")
    for name, (a, b), low in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        _require(min(a, b) >= low, f"{name} is {(a, b)}: must be at least {low}")
    channels, (out_channels, group_in, kh, kw) = input.shape[1], weight.shape
    _require(min(out_channels, group_in, kh, kw) > 0, f"weight is {tuple(weight.shape)}: must not be empty")
    _require(
        channels % group_in == 0 and channels > 0, f"weight is {tuple(weight.shape)} but input has {channels} channels"
    )
    groups = channels // group_in
    _require(out_channels % groups == 0, f"{out_channels} output channels do not divide into {groups} groups")
    _require(bias is None or bias.shape == (out_channels,), f"bias must be ({out_channels},)")
    taps = kh * kw
    offset_groups = offset.shape[1] // (2 * taps)
    _require(
        offset_groups > 0 and offset.shape[1] % (2 * taps) == 0 and channels % offset_groups == 0,
        f"offset has {offset.shape[1]} channels: must be 2 * {kh} * {kw} * offset_groups, where offset_groups divides "
        f"{channels}",
    )
    size = [
        (side + 2 * p - (d * (k - 1) + 1)) // s + 1
        for side, k, s, p, d in zip(input.shape[2:], (kh, kw), stride, padding, dilation)
    ]
    _require(min(size) > 0, f"output size would be {tuple(size)}: must not be empty")
    expected = (input.shape[0], offset.shape[1], *size)
    _require(offset.shape == expected, f"offset is {tuple(offset.shape)}: must be {tuple(expected)}")
    expected = (input.shape[0], offset_groups * taps, *size)
    _require(mask is None or mask.shape == expected, f"mask must be {tuple(expected)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"deform_conv2d: {message}")
