"""Translations to ONNX of operators that torch has no translation of, or none that suits detectors."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset18

# The functions are traced with symbolic values, which the types of onnxscript do not describe.
op: Any = opset18

_MAX_INT64 = torch.iinfo(torch.int64).max
_LOWEST = torch.finfo(torch.float32).min


def _nms_mask(boxes: Any, scores: Any, groups: Any, iou_threshold: float, valid: Any = None) -> Any:
    """:func:`cpm_rcnn.ops.nms.nms_mask` for groups 0, 1, ...; IoUs are computed in float32.

    Groups are the classes of ``NonMaxSuppression``: each class has the scores of all boxes, and those of boxes of other
    groups are below its score threshold. So boxes do not have to be moved apart, which would cost precision.
    """
    member = op.Equal(op.Unsqueeze(groups, [0]), op.Unsqueeze(op.Range(0, op.Add(op.ReduceMax(groups), 1), 1), [1]))
    if valid is not None:
        member = op.And(member, op.Unsqueeze(valid, [0]))
    class_scores = op.Where(member, op.Unsqueeze(scores, [0]), op.Constant(value_float=float("-inf")))
    chosen = op.NonMaxSuppression(
        op.Unsqueeze(op.Cast(boxes, to=TensorProto.FLOAT), [0]),
        op.Unsqueeze(class_scores, [0]),
        op.Constant(value_ints=[_MAX_INT64]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[_LOWEST]),
    )
    # (batch, class, box) of each box that is kept
    rows = op.Gather(chosen, op.Constant(value_int=2), axis=1)
    none = op.ConstantOfShape(op.Shape(groups))
    kept = op.ScatterElements(none, rows, op.Expand(op.Constant(value_float=1.0), op.Shape(rows)), axis=0)
    return op.Cast(kept, to=TensorProto.BOOL)


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """``aten.sort.stable``: of equal values, ``TopK`` returns the one with the lower index first."""
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _less_or_equal(a: Any, b: Any) -> Any:
    """``operator.le`` in assertions, which are removed, but only after bounds beyond int64 would have been an error."""
    return op.LessOrEqual(a, min(b, _MAX_INT64) if isinstance(b, int) else b)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.cpm_rcnn.nms_mask.default: _nms_mask,
    torch.ops.aten.sort.stable: _stable_sort,
    operator.le: _less_or_equal,
}
