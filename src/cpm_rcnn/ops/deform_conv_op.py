"""The operators ``torch.ops.cpm_rcnn.deform_conv2d`` and ``deform_conv2d_backward``.

They are registered with torch's dispatcher together with their output shapes and their gradient, so ``torch.compile``
and ``torch.export`` treat each as one opaque operator. When they run, :func:`select_backend` chooses the
implementation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpm_rcnn.ops.deform_conv_backends import select_backend


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
    """Deformable convolution without bias.

    The arguments are not checked here: :func:`cpm_rcnn.ops.deform_conv2d` describes and checks them. The output has
    the memory format (contiguous or channels-last) of ``input``.
    """
    backend = select_backend(input, offset, mask, weight)
    output = backend.forward(input, offset, mask, weight, _pair(stride), _pair(padding), _pair(dilation))
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
    """Gradients of input, offset, mask and weight.

    ``needed`` holds one flag per gradient, in this order. A gradient that is not needed is an empty tensor, as is the
    gradient of a mask that is None.
    """
    results = _results(input, offset, mask, weight, needed)
    backend = select_backend(input, offset, mask, weight)
    geometry = (_pair(stride), _pair(padding), _pair(dilation))
    grads = backend.backward(grad_output, input, offset, mask, weight, *geometry, [want for _, want in results])
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
    """For each gradient, return a tensor of the same shape and dtype, and whether the gradient is computed.

    Without a mask, ``offset`` takes the mask's position in the list, because the operator returns four tensors.
    """
    like = (input, offset, offset if mask is None else mask, weight)
    return list(zip(like, (needed[0], needed[1], needed[2] and mask is not None, needed[3])))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return channels-last if ``x`` is channels-last and not also contiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
