"""Deformable convolution, v1 and v2: the function and its layers."""

from collections.abc import Sequence

import torch
import torchvision.ops
from torch import Tensor, nn

from cpm_rcnn.errors import check_choice
from cpm_rcnn.ops.deform_conv_op import deform_conv2d_op

BACKENDS = ("compiled", "torchvision")
_backend = BACKENDS[0]


def use_deform_backend(name: str) -> None:
    """Choose what :func:`deform_conv2d` computes with, for this process.

    Args:
        name: ``compiled``, this project's kernels (torchvision's operator where there are none), or ``torchvision``.

    Raises:
        UserError: another name.
    """
    check_choice("ops.deform", name, BACKENDS)
    global _backend
    _backend = name


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

    Tap k of an output pixel samples the input, bilinear and zero outside, at the tap's own place plus its offset.
    The kernels know float32, float64 and bfloat16 on a CPU, float32, bfloat16 and float16 on a GPU, with sums in
    float32 (of float64 in its own). What they lack, torchvision's operator computes. Under autocast, input, weight,
    bias and mask are taken in autocast's type; offsets keep theirs.

    Args:
        input: (N, C_in, H, W).
        offset: (N, 2 * offset_groups * kh * kw, H_out, W_out) pixels, (dy, dx) per tap.
        weight: (C_out, C_in / groups, kh, kw).
        bias: (C_out,).
        stride: vertical and horizontal step, or one number for both.
        padding: zeros added on each side.
        dilation: spacing of the taps.
        mask: (N, offset_groups * kh * kw, H_out, W_out) factor a tap (v2), or None (v1).

    Returns:
        (N, C_out, H_out, W_out) in the dtype and the memory format of ``input``.

    Raises:
        RuntimeError: shapes, types or devices that do not fit together.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if input.dtype is not torch.float64:
            input, weight = input.to(dtype), weight.to(dtype)
            bias, mask = (None if x is None else x.to(dtype) for x in (bias, mask))
    geometry = (_pair(stride), _pair(padding), _pair(dilation))
    _check(input, offset, weight, bias, *geometry, mask)
    with torch.autocast(device, enabled=False):
        if _backend == "torchvision" or device not in ("cpu", "cuda"):
            return _by_torchvision(input, offset, weight, bias, *geometry, mask)
        output = deform_conv2d_op(input, offset, mask, weight, *geometry)
        return output if bias is None else output + bias[:, None, None]


class DeformConv2d(torchvision.ops.DeformConv2d):
    """torchvision's layer over :func:`deform_conv2d`; its offsets, and mask, come from outside."""

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, C_out, H_out, W_out) from ``input`` (N, C_in, H, W); see :func:`deform_conv2d` for the others."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


class DeformConv2dPack(DeformConv2d):
    """A deformable convolution that predicts its own offsets, and mask, from its input.

    Its prediction starts at zero, so that it starts as a plain convolution (spec section 2), at half its strength if
    modulated.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: of the convolution, and of the one that predicts offsets.
        stride: likewise.
        padding: likewise.
        dilation: likewise.
        groups: of the convolution.
        bias: whether the convolution has one.
        offset_groups: runs of input channels with offsets of their own.
        modulated: whether each tap has a factor in 0..1 too (v2).
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
        """The v1 layer that takes the place of ``conv``, with its geometry, groups and weights."""
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
        """(N, C_out, H_out, W_out) from ``input`` (N, C_in, H, W)."""
        predicted = self.conv_offset(input)
        if not self.modulated:
            return super().forward(input, predicted)
        taps = predicted.shape[1] // 3
        return super().forward(input, predicted[:, : 2 * taps], predicted[:, 2 * taps :].sigmoid())


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _by_torchvision(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """Torchvision's operator, in float32 where halves come in: it does not train in them."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    input_, offset, weight = (x.to(dtype) for x in (input, offset, weight))
    bias, mask = (None if x is None else x.to(dtype) for x in (bias, mask))
    output = torchvision.ops.deform_conv2d(input_, offset, weight, bias, stride, padding, dilation, mask)
    return output.to(input.dtype)


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
    """Raise RuntimeError, as torchvision does, unless shapes, types and devices fit together."""
    named = {"input": input, "offset": offset, "weight": weight, "mask": mask, "bias": bias}
    tensors = {name: x for name, x in named.items() if x is not None}
    for name, x in tensors.items():
        _require(x.device == input.device, f"{name} is on {x.device}, input on {input.device}")
        _require(x.is_floating_point(), f"{name} is {x.dtype}: must be floating point")
        _require(name == "bias" or x.ndim == 4, f"{name} has {x.ndim} dimensions: must have 4")
        # Offsets and masks in float32 are no more work beside a half-precision input, and far finer.
        alike = x.dtype == input.dtype or (name in ("offset", "mask") and x.dtype is torch.float32)
        _require(alike and (x.dtype is input.dtype or input.itemsize == 2), f"{name} is {x.dtype}, input {input.dtype}")
    for name, (a, b), low in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        _require(min(a, b) >= low, f"{name} is {(a, b)}: must be at least {low}")
    channels, (out_channels, group_in, kh, kw) = input.shape[1], weight.shape
    _require(min(out_channels, group_in, kh, kw) > 0, f"weight is {tuple(weight.shape)}: must not be empty")
    _require(
        channels % group_in == 0 and channels > 0, f"weight is {tuple(weight.shape)}, input has {channels} channels"
    )
    groups = channels // group_in
    _require(out_channels % groups == 0, f"{out_channels} output channels do not divide into {groups} groups")
    _require(bias is None or bias.shape == (out_channels,), f"bias must be ({out_channels},)")
    taps = kh * kw
    offset_groups = offset.shape[1] // (2 * taps)
    _require(
        offset_groups > 0 and offset.shape[1] % (2 * taps) == 0 and channels % offset_groups == 0,
        f"offset has {offset.shape[1]} channels: must be 2 * {kh} * {kw} * offset_groups, which divide {channels}",
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


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(f"deform_conv2d: {otherwise}")
