"""Detectors as ``.pt2`` files, which ``torch.export.load`` reads; they need torch and torchvision only."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torch.export import ExportedProgram

from cpm_rcnn.inference.export.metadata import METADATA_KEY

# Assertions that the tracer adds to a graph.
_ASSERTIONS = (torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default)


def write_pt2(program: ExportedProgram, path: Path, metadata: str) -> None:
    """Write the graph of a detector, and ``metadata`` (JSON) as the extra file :data:`METADATA_KEY`.

    The graph must have been traced with :data:`REPLACEMENTS`. Its assertions are removed, as torch removes them from
    ONNX files. The tracer derives some of them from the memory format of its example, so that a graph which is right
    for a feature map of one cell refuses it.
    """
    graph = program.graph_module.graph
    for node in graph.nodes:
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    torch.export.save(program, path, extra_files={METADATA_KEY: metadata})


class Pt2Runner:
    """Runs a file that :func:`write_pt2` wrote.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._module = torch.export.load(path).module()

    def __call__(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """See :class:`~cpm_rcnn.inference.export.program.BatchDetector`."""
        with torch.no_grad():
            return self._module(images, sizes)


def _nms_mask(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, valid: Tensor | None = None
) -> Tensor:
    """:func:`~cpm_rcnn.ops.nms.nms_mask` in torchvision's operator.

    Boxes of different groups are moved apart. In float64, this changes IoUs by about 1e-10.
    """
    count = boxes.shape[0]
    first = boxes.min()
    boxes = boxes + (groups * (boxes.max() - first + 1))[:, None]
    # torchvision declares that its operator keeps at least two boxes, so two are added that overlap no other.
    extra = first + torch.arange(-4, 0).view(2, 2).repeat_interleave(2, dim=1)
    boxes, scores = torch.cat([boxes, extra]), torch.cat([scores.to(boxes.dtype), boxes.new_zeros(2)])
    candidate = torch.ones_like(scores, dtype=torch.bool)
    if valid is not None:
        candidate = torch.cat([valid, torch.ones(2, dtype=torch.bool)])
    rows = candidate.nonzero().squeeze(1)
    kept = rows[torchvision.ops.nms(boxes[rows], scores[rows], iou_threshold)]
    return torch.zeros_like(candidate).index_fill(0, kept, True).narrow(0, 0, count)


REPLACEMENTS = {torch.ops.cpm_rcnn.nms_mask.default: _nms_mask}
