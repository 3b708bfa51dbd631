"""``torch.ops.cpm_rcnn.deform_conv2d`` and ``deform_conv2d_backward``: which kernel computes them, and their gradient.

On a CPU the compiled kernel (``kernels/*.cpp``), on a GPU the Triton one (``kernels/deform_conv_triton.py``); where
either is missing or does not know a case, torchvision's operator. Registered with torch's dispatcher, they are opaque
to ``torch.compile`` and ``torch.export`` but known to them by shape and gradient.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision.ops  # noqa: F401  registers the operators that are fallen back to
from torch import Tensor

# At the top of the repository, where no type checker finds it.
_KERNELS = importlib.import_module("cpm_rcnn.kernels")
_HALVES = (torch.float16, torch.bfloat16)
_LIBRARY = "deform_conv_cpu*.so"


@torch.library.custom_op("cpm_rcnn::deform_conv2d", mutates_args=())
def deform_conv2d_op(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution without bias; arguments are checked by :func:`cpm_rcnn.ops.deform_conv2d`.

    The output has the memory format (channels-last or not) of ``input``.
    """
    forward, _ = _kernels_for(input, offset, mask, weight)
    output = forward(input, offset, mask, weight, _pair(stride), _pair(padding), _pair(dilation))
    return output.contiguous(memory_format=_memory_format(input))


@torch.library.custom_op("cpm_rcnn::deform_conv2d_backward", mutates_args=())
def deform_conv2d_backward_op(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, offset, mask and weight; empty tensors where not ``needed``."""
    results = _results(input, offset, mask, weight, needed)
    _, backward = _kernels_for(input, offset, mask, weight)
    geometry = (_pair(stride), _pair(padding), _pair(dilation))
    grads = backward(grad_output, input, offset, mask, weight, *geometry, [want for _, want in results])
    return tuple(  # type: ignore[return-value]
        grad.contiguous(memory_format=_memory_format(x)) if want else x.new_empty(0)
        for grad, (x, want) in zip(grads, results)
    )


@deform_conv2d_op.register_fake
def _(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    shape = (input.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input))


@deform_conv2d_backward_op.register_fake
def _(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        torch.empty_like(x, memory_format=_memory_format(x)) if want else x.new_empty(0)
        for x, want in _results(input, offset, mask, weight, needed)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, weight, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, mask, weight)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:4])
    grads = torch.ops.cpm_rcnn.deform_conv2d_backward(grad_output, *ctx.saved_tensors, *ctx.geometry, needed)
    return (*(grad if need else None for grad, need in zip(grads, needed)), None, None, None)


deform_conv2d_op.register_autograd(_differentiate, setup_context=_setup_context)


def _results(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, needed: Sequence[bool]
) -> list[tuple[Tensor, bool]]:
    """For each gradient what it is like, and whether it is given; without a mask its place is held by the offsets."""
    like = (input, offset, offset if mask is None else mask, weight)
    return list(zip(like, (needed[0], needed[1], needed[2] and mask is not None, needed[3])))


def _kernels_for(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of the kernel that knows this case."""
    if input.is_cuda and (kernel := _triton_kernel(input, offset, weight)):
        return kernel.forward, kernel.backward
    if _alike(input, offset, mask) and _cpu_kernel():
        return torch.ops.cpm_rcnn_cpu.deform_conv2d, torch.ops.cpm_rcnn_cpu.deform_conv2d_backward
    return _torchvision, _torchvision_backward


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last where ``x`` is that and nothing else."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _alike(input: Tensor, offset: Tensor, mask: Tensor | None) -> bool:
    """Whether the CPU kernel knows these types: one for all, and not float16."""
    alike = offset.dtype is input.dtype and (mask is None or mask.dtype is input.dtype)
    return input.device.type == "cpu" and input.dtype is not torch.float16 and alike


@cache
def _cpu_kernel() -> bool:
    """Whether the compiled kernel is there; the first call loads it, or warns once."""
    built = sorted(path for folder in _KERNELS.__path__ for path in Path(folder).glob(_LIBRARY))
    try:
        if not built:
            raise OSError("it was not built when the package was installed")
        torch.ops.load_library(built[0])
    except OSError as error:
        warnings.warn(
            f"deformable convolution: no compiled CPU kernel ({str(error).splitlines()[0]}), torchvision's slower "
            "operator takes its place; to build it: pip install --no-build-isolation cpm-rcnn, with a C++ compiler",
            stacklevel=2,
        )
        return False
    return True


@cache
def _triton() -> ModuleType | None:
    try:
        return importlib.import_module("cpm_rcnn.kernels.deform_conv_triton")
    except ImportError:
        return None


def _triton_kernel(input: Tensor, offset: Tensor, weight: Tensor) -> Any:
    """The Triton kernel, where it is there and knows this case."""
    kernel = _triton()
    return kernel if kernel is not None and kernel.supports(input, offset, weight) else None


def _torchvision_arguments(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, geometry: Sequence[tuple[int, int]]
) -> tuple[Any, ...]:
    """Torchvision's operator has its own order, takes no half precision that trains, and wants a mask in any case."""
    dtype = torch.float32 if input.dtype in _HALVES else input.dtype
    use_mask = mask is not None
    taps = weight.shape[2] * weight.shape[3]
    groups, offset_groups = input.shape[1] // weight.shape[1], offset.shape[1] // (2 * taps)
    mask = input.new_zeros(input.shape[0], 1) if mask is None else mask
    bias = weight.new_zeros(weight.shape[0])
    tensors = (x.to(dtype).contiguous() for x in (input, weight, offset, mask, bias))
    return (*tensors, *(side for pair in geometry for side in pair), groups, offset_groups, use_mask)


def _torchvision(
    input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *geometry: tuple[int, int]
) -> Tensor:
    arguments = _torchvision_arguments(input, offset, mask, weight, geometry)
    return torch.ops.torchvision.deform_conv2d(*arguments).to(input.dtype)


def _torchvision_backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *geometry, _ = rest  # it computes all gradients, needed or not
    arguments = _torchvision_arguments(input, offset, mask, weight, geometry)
    grad = grad_output.to(arguments[0].dtype).contiguous()
    grad_input, grad_weight, grad_offset, grad_mask, _ = torch.ops.torchvision._deform_conv2d_backward(grad, *arguments)
    return (
        grad_input.to(input.dtype),
        grad_offset.to(offset.dtype),
        grad_mask.to(input.dtype if mask is None else mask.dtype),
        grad_weight.to(weight.dtype),
    )
