"""3x3 convolution with stride 1 and padding 1: the function, its operators for ``torch.compile``, and its layer.

On a CPU, convolutions of many channels are computed by Winograd's algorithm (``kernels/winograd_cpu.cpp``), which needs
about a third of the multiplications. All others are computed by torch.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from cpm_rcnn.ops.libraries import load_cpu_library

# Where the kernel was faster than torch's convolution, see docs/conv3x3.md. It needs multiples of 32 channels.
_CHANNEL_MULTIPLE, _MIN_CHANNELS, _MIN_POSITIONS, _MIN_SIDE = 32, 64, 256, 3
# These instructions multiply bfloat16 at several times the rate of float32, which should outweigh the multiplications
# that Winograd's algorithm saves. Not measured.
_HAS_AMX = torch.cpu._is_amx_tile_supported()


def conv3x3(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv2d(input, weight, bias, padding=1)`` for 3x3 weights, also under autocast.

    The kernel for CPUs is used if all tensors are float32, or bfloat16 on a processor without AMX; if both numbers of
    channels are multiples of 32 and at least 64; and if there are at least 256 outputs per channel, in images of at
    least 3 x 3. Under autocast it takes the weight and the bias in float32, and does not round them. Its output is
    channels-last. It can be differentiated any number of times in reverse mode, but not by forward-mode differentiation
    or ``torch.func.grad``. ``torch.export`` sees torch's convolution. A value that is not finite makes the whole tiles
    of 4 x 4 outputs that depend on it not finite, and so may values above 1e37. See docs/conv3x3.md for its rounding
    errors.

    Args:
        input: (N, C_in, H, W).
        weight: (C_out, C_in, 3, 3).
        bias: (C_out,), or None.

    Returns:
        (N, C_out, H, W).
    """
    if input.device.type == "cpu" and not torch.compiler.is_exporting():
        if torch.is_autocast_enabled("cpu"):
            input = _autocast(input)
        if _kernel_pays(input, weight, bias):
            return conv3x3_op(input, weight, bias)
    return F.conv2d(input, weight, bias, padding=1)


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` with 3x3 weights, stride 1 and padding 1, computed by :func:`conv3x3`."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Compute (N, C_out, H, W) from ``input`` (N, C_in, H, W)."""
        return conv3x3(input, self.weight, self.bias)


def use_conv3x3(module: nn.Module) -> None:
    """Make :class:`Conv3x3` of all layers inside ``module`` that it computes faster.

    These are the layers of type ``nn.Conv2d`` with 3x3 weights, stride 1, padding 1, one group and enough channels.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _is_plain(layer) and _enough_channels(layer.weight):
            # Both classes have the same state. Hooks of the layer and references to it stay valid.
            layer.__class__ = Conv3x3


@torch.library.custom_op("cpm_rcnn::conv3x3", mutates_args=(), device_types="cpu")
def conv3x3_op(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of CPU tensors that the kernel supports. The output is channels-last."""
    if load_cpu_kernel():
        return torch.ops.cpm_rcnn_cpu.conv3x3(input, weight, bias)
    bias = None if bias is None else bias.to(input.dtype)
    return _channels_last(F.conv2d(input, weight.to(input.dtype), bias, padding=1))


@torch.library.custom_op("cpm_rcnn::conv3x3_grad_input", mutates_args=(), device_types="cpu")
def conv3x3_grad_input_op(grad_output: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input (N, C_in, H, W), channels-last."""
    if load_cpu_kernel():
        return torch.ops.cpm_rcnn_cpu.conv3x3_grad_input(grad_output, weight)
    shape = (len(grad_output), weight.shape[1], *grad_output.shape[2:])
    return _channels_last(conv2d_input(shape, weight.to(grad_output.dtype), grad_output, padding=1))


@torch.library.custom_op("cpm_rcnn::conv3x3_grad_weight", mutates_args=(), device_types="cpu")
def conv3x3_grad_weight_op(grad_output: Tensor, input: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a weight (C_out, C_in, 3, 3) of this dtype, which is float32 or that of the input."""
    if load_cpu_kernel():
        return torch.ops.cpm_rcnn_cpu.conv3x3_grad_weight(grad_output, input, dtype)
    shape = (grad_output.shape[1], input.shape[1], 3, 3)
    return conv2d_weight(input, shape, grad_output, padding=1).to(dtype).contiguous()


@conv3x3_op.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _empty_channels_last(input, weight.shape[0])


@conv3x3_grad_input_op.register_fake
def _(grad_output: Tensor, weight: Tensor) -> Tensor:
    return _empty_channels_last(grad_output, weight.shape[1])


@conv3x3_grad_weight_op.register_fake
def _(grad_output: Tensor, input: Tensor, dtype: torch.dtype) -> Tensor:
    return input.new_empty(grad_output.shape[1], input.shape[1], 3, 3, dtype=dtype)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _save_with_bias(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.bias_dtype = None if inputs[2] is None else inputs[2].dtype


# Each operator is linear in both of its tensors, so its derivatives are the two other operators.
def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        conv3x3_grad_input_op(grad_output, weight) if needs_input else None,
        conv3x3_grad_weight_op(grad_output, input, weight.dtype) if needs_weight else None,
        grad_output.sum((0, 2, 3), dtype=ctx.bias_dtype) if needs_bias else None,
    )


def _differentiate_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, weight = ctx.saved_tensors
    needs_grad_output, needs_weight = ctx.needs_input_grad
    return (
        conv3x3_op(grad, weight, None) if needs_grad_output else None,
        conv3x3_grad_weight_op(grad_output, grad, weight.dtype) if needs_weight else None,
    )


def _differentiate_grad_weight(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, input = ctx.saved_tensors
    needs_grad_output, needs_input, _ = ctx.needs_input_grad
    return (
        conv3x3_op(input, grad, None) if needs_grad_output else None,
        conv3x3_grad_input_op(grad_output, grad) if needs_input else None,
        None,
    )


conv3x3_op.register_autograd(_differentiate, setup_context=_save_with_bias)
conv3x3_grad_input_op.register_autograd(_differentiate_grad_input, setup_context=_save_inputs)
conv3x3_grad_weight_op.register_autograd(_differentiate_grad_weight, setup_context=_save_inputs)


@cache
def load_cpu_kernel() -> bool:
    """Load the compiled kernel on the first call, and return whether it is available."""
    return load_cpu_library("winograd_cpu")


def _kernel_pays(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel supports these CPU tensors and is faster than torch's convolution."""
    if input.dtype not in (torch.float32, torch.bfloat16) or (input.dtype is torch.bfloat16 and _HAS_AMX):
        return False
    # The kernel computes in float32 anyway, so autocast need not convert the weight and the bias.
    allowed = {input.dtype, torch.float32} if torch.is_autocast_enabled("cpu") else {input.dtype}
    if weight.dtype not in allowed or (bias is not None and bias.dtype not in allowed) or input.ndim != 4:
        return False
    images, channels, height, width = input.shape
    return (
        channels == weight.shape[1]
        and _enough_channels(weight)
        and height >= _MIN_SIDE
        and width >= _MIN_SIDE
        and images * height * width >= _MIN_POSITIONS
    )


def _enough_channels(weight: Tensor) -> bool:
    return all(size >= _MIN_CHANNELS and size % _CHANNEL_MULTIPLE == 0 for size in weight.shape[:2])


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether the layer is a 3x3 convolution with stride 1, padding 1 and one group."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _autocast(x: Tensor) -> Tensor:
    """Convert to the dtype of autocast what autocast converts."""
    return x.to(torch.get_autocast_dtype("cpu")) if x.is_floating_point() and x.dtype is not torch.float64 else x


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty_channels_last(like: Tensor, channels: int) -> Tensor:
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
