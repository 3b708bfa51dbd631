"""Normalization of uint8 images, in one pass over the memory on a CPU (``kernels/normalize_cpu.cpp``)."""

from functools import cache

import torch
from torch import Tensor

from cpm_rcnn.ops.libraries import load_cpu_library


def normalize_image(image: Tensor, mean: Tensor, std: Tensor, out: Tensor, reverse: bool = False) -> None:
    """Write ``(image - mean) / std`` into ``out``. All implementations give the same values.

    Args:
        image: (3, H, W) uint8.
        mean: (3, 1, 1) floating-point tensor, of the channels of ``out``.
        std: (3, 1, 1), likewise.
        out: (3, H, W), in the dtype of ``mean``; may be a view.
        reverse: whether ``out`` has the channels in reverse order.
    """
    if _kernel_supports(image, mean, out) and load_cpu_kernel():
        torch.ops.cpm_rcnn_cpu.normalize_image(image, mean, std, reverse, out)
    else:
        # In place: a temporary copy in float32 would take longer than the arithmetic.
        out.copy_(image.flip(0) if reverse else image).sub_(mean).div_(std)


@cache
def load_cpu_kernel() -> bool:
    """Load the compiled kernel on the first call, and return whether it is available."""
    return load_cpu_library("normalize_cpu")


def _kernel_supports(image: Tensor, mean: Tensor, out: Tensor) -> bool:
    return (
        image.device.type == out.device.type == "cpu"
        and image.dtype is torch.uint8
        and mean.dtype is out.dtype is torch.float32
        and out.stride(-1) == 1
        and not torch.compiler.is_compiling()
    )
