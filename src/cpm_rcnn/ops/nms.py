"""Non-maximum suppression (NMS) of many groups at once: the function, its operator, and its implementations.

There are four implementations with one result: the compiled C++ kernel for CPU tensors (``kernels/nms_cpu.cpp``), the
Triton kernel for CUDA tensors (``kernels/nms_triton.py``), torchvision's operator per group on a CPU without the
compiled kernel, and :func:`nms_mask_reference` on all other devices.
"""

import importlib
from functools import cache
from types import ModuleType

import torch
import torchvision.ops
from torch import Tensor

from cpm_rcnn.ops.libraries import load_cpu_library

# The number of boxes that the reference compares with all boxes before them at a time.
_BLOCK = 64


def nms_mask(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, valid: Tensor | None = None
) -> Tensor:
    """Non-maximum suppression within each group. Widths are x2 - x1.

    The boxes of a group are processed in the order of descending scores. Each one is kept unless its IoU with a kept
    box is greater than the threshold. Equal scores are ordered by row, and NaN is the highest score.

    The result is that of ``torchvision.ops.nms`` on a CPU for each group, including boxes that are NaN, infinite or
    inverted (x2 < x1). IoUs are computed in the dtype of ``boxes``, and in float32 for half precision. The shape of the
    result does not depend on the data, and no step waits for the device.

    Args:
        boxes: (R, 4) xyxy floating-point tensor.
        scores: (R,) floating-point tensor.
        groups: (R,) int64 tensor of any values; boxes of different groups do not suppress each other.
        iou_threshold: boxes that overlap a kept box by more than this are suppressed.
        valid: (R,) bool tensor, or None if all rows are valid. Other rows are not kept and suppress no box.

    Returns:
        (R,) bool tensor, True for the rows that are kept.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
    """
    _check(boxes, scores, groups, valid)
    boxes, scores = (x.detach().float() if x.itemsize < 4 else x.detach() for x in (boxes, scores))
    return nms_mask_op(boxes, scores, groups, iou_threshold, valid)


@torch.library.custom_op("cpm_rcnn::nms_mask", mutates_args=())
def nms_mask_op(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, valid: Tensor | None = None
) -> Tensor:
    """:func:`nms_mask` without checks. Boxes and scores are float32 or float64."""
    if boxes.device.type == "cpu":
        if load_cpu_kernel():
            return torch.ops.cpm_rcnn_cpu.nms_mask(boxes, scores, groups, iou_threshold, valid)
        return _torchvision_mask(boxes, scores, groups, iou_threshold, valid)
    kernel = load_triton_kernel() if boxes.device.type == "cuda" else None
    if kernel is not None and kernel.supports(boxes):
        order = sorted_order(scores, groups)
        limit = rounded_threshold(iou_threshold, boxes.dtype)
        return kernel.nms_mask(boxes, groups, order, limit, valid)
    return nms_mask_reference(boxes, scores, groups, iou_threshold, valid)


@nms_mask_op.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, valid: Tensor | None = None) -> Tensor:
    return boxes.new_empty(boxes.shape[0], dtype=torch.bool)


def nms_mask_reference(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, valid: Tensor | None = None
) -> Tensor:
    """:func:`nms_mask` in operations of torch that every device has and that never wait for it.

    Each block of 64 boxes is compared with all boxes before it. Within the block, ``kept = not suppressed by a kept
    box`` is repeated until a chain of 64 boxes, each suppressing the next one, would be resolved. This computes all
    R * R / 2 IoUs, with 64 * R of them in memory at a time, and takes about 5 * R small operations, which on most
    devices take longer than the IoUs.

    Args:
        boxes: (R, 4) xyxy, float32 or float64.
        scores: (R,) float32 or float64.
        groups: (R,) int64.
        iou_threshold: as in :func:`nms_mask`.
        valid: as in :func:`nms_mask`.
    """
    order = sorted_order(scores, groups)
    limit = rounded_threshold(iou_threshold, boxes.dtype)
    boxes, groups = boxes[order], groups[order]
    kept = torch.ones_like(groups, dtype=torch.bool) if valid is None else valid[order]
    for first in range(0, len(boxes), _BLOCK):
        last = min(first + _BLOCK, len(boxes))
        suppresses = _iou(boxes[:last], boxes[first:last]) > limit
        suppresses &= groups[:last, None] == groups[first:last]
        candidates = kept[first:last] & ~(suppresses[:first] & kept[:first, None]).any(0)
        inside = suppresses[first:].triu(1)
        result = candidates
        # The first box is final, and each repetition makes one more box final.
        for _ in range(last - first - 1):
            result = candidates & ~(inside & result[:, None]).any(0)
        kept[first:last] = result
    return torch.empty_like(kept).scatter_(0, order, kept)


def sorted_order(scores: Tensor, groups: Tensor) -> Tensor:
    """The order (R,) int64 by group, then by descending score, then by row. NaN is the highest score."""
    # Some devices order the two zeros, or NaNs by their sign.
    scores = (scores + 0.0).masked_fill(scores.isnan(), torch.nan)
    order = scores.argsort(descending=True, stable=True)
    return order[groups[order].argsort(stable=True)]


def rounded_threshold(iou_threshold: float, dtype: torch.dtype) -> float:
    """The largest number of the dtype that is not greater than the threshold.

    Comparing an IoU of this dtype with it gives the result of comparing both in float64, as torchvision does.
    """
    value = torch.tensor(iou_threshold, dtype=dtype)
    if value.item() > iou_threshold:
        value = value.nextafter(torch.tensor(-torch.inf, dtype=dtype))
    return value.item()


def _iou(kept: Tensor, boxes: Tensor) -> Tensor:
    """IoU (N, M) of kept boxes (N, 4) and boxes (M, 4) in the operations of torchvision's operator.

    As in its ``std::max(a, b)``, the maximum and minimum are the first argument if either is NaN.
    """
    a, b = kept[:, None], boxes[None]
    near, far = torch.where(a < b, b, a), torch.where(b < a, b, a)
    sides = far[..., 2:] - near[..., :2]
    sides = torch.where(sides > 0, sides, 0)
    overlap = sides[..., 0] * sides[..., 1]
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    return overlap / (areas[0] + areas[1] - overlap)


def _torchvision_mask(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, valid: Tensor | None
) -> Tensor:
    """The result of torchvision's operator for each group of CPU tensors."""
    mask = torch.zeros(len(boxes), dtype=torch.bool)
    order = sorted_order(scores, groups)
    if valid is not None:
        order = order[valid[order]]
    _, sizes = groups[order].unique_consecutive(return_counts=True)
    for rows in order.split(sizes.tolist()):
        # The rows are sorted, and the operator keeps the order of equal scores.
        mask[rows[torchvision.ops.nms(boxes[rows], boxes.new_zeros(len(rows)), iou_threshold)]] = True
    return mask


@cache
def load_cpu_kernel() -> bool:
    """Load the compiled CPU kernel on the first call, and return whether it is available."""
    return load_cpu_library("nms_cpu")


@cache
def load_triton_kernel() -> ModuleType | None:
    """Return the module with the Triton kernels, or None if Triton is not installed."""
    try:
        return importlib.import_module("cpm_rcnn.kernels.nms_triton")
    except ImportError:
        return None


def _check(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor | None) -> None:
    """Raise RuntimeError unless shapes, dtypes and devices match."""
    _require(boxes.ndim == 2 and boxes.shape[1] == 4, f"boxes is {tuple(boxes.shape)}: must be (R, 4)")
    named = {"scores": scores, "groups": groups} | ({} if valid is None else {"valid": valid})
    for name, x in named.items():
        _require(x.shape == boxes.shape[:1], f"{name} is {tuple(x.shape)}: must be ({boxes.shape[0]},)")
        _require(x.device == boxes.device, f"{name} is on {x.device} but boxes is on {boxes.device}")
    for name, x in (("boxes", boxes), ("scores", scores)):
        _require(x.is_floating_point(), f"{name} is {x.dtype}: must be a floating-point dtype")
    _require(groups.dtype is torch.int64, f"groups is {groups.dtype}: must be int64")
    _require(valid is None or valid.dtype is torch.bool, "valid must be bool")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"nms_mask: {message}")
