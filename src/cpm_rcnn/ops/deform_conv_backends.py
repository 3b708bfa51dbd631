"""Implementations of deformable convolution, and the choice between them.

There are three: the compiled C++ kernel for CPU tensors (``kernels/*.cpp``), the Triton kernel for CUDA tensors
(``kernels/deform_conv_triton.py``), and torchvision's operator for everything else. :func:`select_backend` is the only
place that chooses.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torchvision.ops  # noqa: F401  registers torch.ops.torchvision.deform_conv2d
from torch import Tensor

from cpm_rcnn.errors import check_choice
from cpm_rcnn.ops.libraries import load_cpu_library

BACKENDS = ("compiled", "torchvision")
_backend = BACKENDS[0]


class Backend(NamedTuple):
    """One implementation of deformable convolution without bias.

    Attributes:
        forward: ``(input, offset, mask, weight, stride, padding, dilation) -> output``.
        backward: ``(grad_output, input, offset, mask, weight, stride, padding, dilation, needed)`` -> gradients of
            input, offset, mask and weight. ``needed`` holds one flag per gradient; the value of a gradient that is not
            needed is unspecified.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def use_deform_backend(name: str) -> None:
    """Set the backend of :func:`cpm_rcnn.ops.deform_conv2d` for this process.

    Args:
        name: ``"compiled"`` uses this project's kernels, and torchvision's operator for the cases that they do not
            support. ``"torchvision"`` always uses torchvision's operator.

    Raises:
        UserError: ``name`` is neither of these.
    """
    check_choice("ops.deform", name, BACKENDS)
    global _backend
    _backend = name


def select_backend(input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor) -> Backend:
    """Return the implementation that computes the deformable convolution of these tensors.

    Args:
        input: (N, C_in, H, W) tensor. Its device decides which kernel applies.
        offset: (N, 2 * offset_groups * kh * kw, H_out, W_out) tensor.
        mask: (N, offset_groups * kh * kw, H_out, W_out) tensor, or None.
        weight: (C_out, C_in / groups, kh, kw) tensor.
    """
    if _backend == "compiled":
        if input.device.type == "cuda":
            triton_kernel = load_triton_kernel()
            if triton_kernel is not None and triton_kernel.supports(input, offset, weight):
                return Backend(triton_kernel.forward, triton_kernel.backward)
        if input.device.type == "cpu" and _cpu_kernel_supports(input, offset, mask) and load_cpu_kernel():
            return Backend(torch.ops.cpm_rcnn_cpu.deform_conv2d, torch.ops.cpm_rcnn_cpu.deform_conv2d_backward)
    return TORCHVISION


@cache
def load_cpu_kernel() -> bool:
    """Load the compiled CPU kernel on the first call, and return whether it is available."""
    return load_cpu_library("deform_conv_cpu")


@cache
def load_triton_kernel() -> ModuleType | None:
    """Return the module with the Triton kernels, or None if Triton is not installed."""
    try:
        return importlib.import_module("cpm_rcnn.kernels.deform_conv_triton")
    except ImportError:
        return None


def _cpu_kernel_supports(input: Tensor, offset: Tensor, mask: Tensor | None) -> bool:
    """Return whether the CPU kernel supports these dtypes: all equal, and not float16."""
    one_dtype = offset.dtype is input.dtype and (mask is None or mask.dtype is input.dtype)
    return one_dtype and input.dtype is not torch.float16


def _torchvision_forward(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *geometry: tuple[int, int]
) -> Tensor:
    lost = _lost_samples(offset, weight)
    arguments = _torchvision_arguments(input, offset, mask, weight, geometry)
    output = torch.ops.torchvision.deform_conv2d(*arguments).to(input.dtype)
    # An output channel reads the input channels of its group.
    groups = input.shape[1] // weight.shape[1]
    lost_inputs = lost.any(2).repeat_interleave(input.shape[1] // lost.shape[1], 1)  # (N, C_in, H_out, W_out)
    lost_groups = lost_inputs.unflatten(1, (groups, weight.shape[1])).any(2)
    lost_outputs = lost_groups.repeat_interleave(weight.shape[0] // groups, 1)
    return output.masked_fill_(lost_outputs, torch.nan)


def _torchvision_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute all gradients, because torchvision's operator cannot skip those that are not ``needed``."""
    lost = _lost_samples(offset, weight)
    arguments = _torchvision_arguments(input, offset, mask, weight, (stride, padding, dilation))
    grad = grad_output.to(arguments[0].dtype).contiguous()
    grad_input, grad_weight, grad_offset, grad_mask, _ = torch.ops.torchvision._deform_conv2d_backward(grad, *arguments)
    grad_offset.masked_fill_(lost.flatten(1, 2).repeat_interleave(2, 1), torch.nan)
    if mask is not None:
        grad_mask.masked_fill_(lost.flatten(1, 2), torch.nan)
    # A weight is multiplied by one tap's samples of one input channel.
    groups, (out_channels, group_in, *kernel) = input.shape[1] // weight.shape[1], weight.shape
    lost_inputs = lost.any(4).any(3).any(0).repeat_interleave(input.shape[1] // lost.shape[1], 0)  # (C_in, taps)
    lost_weights = lost_inputs.view(groups, group_in, *kernel).repeat_interleave(out_channels // groups, 0)
    grad_weight.masked_fill_(lost_weights, torch.nan)
    return (
        grad_input.to(input.dtype),
        grad_offset.to(offset.dtype),
        grad_mask.to(input.dtype if mask is None else mask.dtype),
        grad_weight.to(weight.dtype),
    )


def _lost_samples(offset: Tensor, weight: Tensor) -> Tensor:
    """Return whether each sample has a NaN or infinite offset, as (N, offset_groups, taps, H_out, W_out)."""
    taps = weight.shape[2] * weight.shape[3]
    return ~offset.unflatten(1, (-1, taps, 2)).isfinite().all(3)


def _torchvision_arguments(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, geometry: Sequence[tuple[int, int]]
) -> tuple[Any, ...]:
    """Return the arguments in the order of torchvision's operator.

    Half-precision tensors are converted to float32, because torchvision's operator does not train in half precision.
    The operator requires a mask and a bias even where they are not used.

    The operator reads outside the input for a NaN offset. Offsets that are not finite are therefore replaced by one
    that moves a tap past the input's upper or left border, where it samples zeros.
    """
    dtype = torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
    use_mask = mask is not None
    taps = weight.shape[2] * weight.shape[3]
    groups, offset_groups = input.shape[1] // weight.shape[1], offset.shape[1] // (2 * taps)
    mask = input.new_zeros(input.shape[0], 1) if mask is None else mask
    bias = weight.new_zeros(weight.shape[0])
    last_tap = max(side + padding for side, padding in zip(input.shape[2:], geometry[1]))
    offset = offset.to(dtype).where(offset.isfinite(), -(last_tap + 2))
    tensors = (x.to(dtype).contiguous() for x in (input, weight, offset, mask, bias))
    return (*tensors, *(side for pair in geometry for side in pair), groups, offset_groups, use_mask)


TORCHVISION = Backend(_torchvision_forward, _torchvision_backward)
