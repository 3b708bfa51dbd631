"""The box coordinate convention, and the box arithmetic that depends on it.

A box is ``(x1, y1, x2, y2)`` in pixels. In the *continuous* convention, x2 and y2 are the coordinates where the box
ends, so its width is ``x2 - x1``. In the *inclusive* convention of the CPM R-CNN release, they are the last pixel
inside the box, so its width is ``x2 - x1 + 1`` (docs/method.md section 9). Detectors also differ in where they place
anchors and RoIAlign's samples. Every rule that differs between conventions is a method or an attribute here; no other
code checks which convention is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# log(1000 / 16), the usual limit of dw and dh in the box coder, so that a large delta cannot overflow exp.
_MAX_LOG_SCALE = 4.135166556742356


@dataclass(frozen=True)
class BoxConvention:
    """The meaning of coordinates in one convention, and the box arithmetic that follows from it.

    All methods are pure, broadcast over leading dimensions, and keep dtype and device.

    Attributes:
        name: the key in :data:`CONVENTIONS`.
        extra: number of pixels to add to ``x2 - x1`` to get the width, 0.0 or 1.0.
        anchors: where anchors are, see :meth:`cell_anchors`: ``center``, ``corner``, ``corner_rounded`` or ``release``.
        aligned: whether RoIAlign shifts by half a pixel (``aligned`` of ``torchvision.ops.roi_align``).
        sampling_ratio: RoIAlign's samples per side of a bin; 0 takes as many as the bin has cells, rounded up.
        pads_raw: whether images are padded with zeros before normalization at test; otherwise, and in training, after
            it.
        ranks_probabilities: whether proposals are ranked by their probability in float32, in which many high scores are
            equal, instead of by their logit.
    """

    name: str
    extra: float
    anchors: str
    aligned: bool
    sampling_ratio: int
    pads_raw: bool
    ranks_probabilities: bool = False

    def sizes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Width and height, each (...), of boxes (..., 4)."""
        return boxes[..., 2] - boxes[..., 0] + self.extra, boxes[..., 3] - boxes[..., 1] + self.extra

    def cell_anchors(self, stride: int, size: float, ratios: Sequence[float]) -> Tensor:
        """The anchors of the first cell of a feature map.

        They are centered on the cell (``center``) or on its top left corner (``corner``, as in detectron2 and
        mmdetection; ``corner_rounded``, with coordinates rounded to whole pixels, as in torchvision). Those of the
        release are centered on the cell, and their shape is rounded at the size of the cell and then scaled, for
        example ``[-22, -10, 25, 13]`` for stride 4, size 32, ratio 0.5.

        Args:
            stride: distance between two cells in pixels.
            size: square root of the anchors' area, in pixels.
            ratios: aspect ratios, height / width.

        Returns:
            (len(ratios), 4) float32 xyxy pixels.
        """
        ratio = torch.tensor(ratios, dtype=torch.float64)
        if self.anchors == "release":
            width = (stride / ratio.sqrt()).round()
            height = (width * ratio).round()
            width, height = width * (size / stride), height * (size / stride)
        else:
            width, height = size / ratio.sqrt(), size * ratio.sqrt()
        center = 0.0 if self.anchors.startswith("corner") else 0.5 * (stride - self.extra)
        half_w, half_h = 0.5 * (width - self.extra), 0.5 * (height - self.extra)
        anchors = torch.stack([center - half_w, center - half_h, center + half_w, center + half_h], dim=1).float()
        return anchors.round() if self.anchors == "corner_rounded" else anchors

    def anchor_steps(self, stride: int, cells: Sequence[int], padded: Sequence[int]) -> tuple[int, int]:
        """Distances (y, x) in pixels between the anchors of neighboring cells.

        They are the level's stride, except in torchvision, where they are the rounded-down quotient of the size of the
        padded image and the number of cells. On P6 it is smaller than the stride if P5 has an odd number of cells.

        Args:
            stride: stride of the level in pixels.
            cells: height and width of the level in cells.
            padded: height and width of the padded image in pixels.
        """
        if self.anchors == "corner_rounded":
            return padded[0] // cells[0], padded[1] // cells[1]
        return stride, stride

    def area(self, boxes: Tensor) -> Tensor:
        """Areas (...) in square pixels of boxes (..., 4)."""
        width, height = self.sizes(boxes)
        return width * height

    def inverted(self, boxes: Tensor) -> Tensor:
        """Whether boxes (..., 4) end before they begin, (...) bool.

        In the inclusive convention, a box that is narrower than a pixel has x2 < x1. Resizing an image multiplies the
        difference, so only boxes that end more than 32 pixels before they begin are inverted there.
        """
        return (boxes[..., 2:] - boxes[..., :2] < -32 * self.extra).any(dim=-1)

    def intersection(self, a: Tensor, b: Tensor) -> Tensor:
        """Areas (...) in square pixels that boxes ``a`` and ``b`` (..., 4) share, elementwise with broadcasting."""
        width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0]) + self.extra
        height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1]) + self.extra
        return width.clamp_(min=0) * height.clamp_(min=0)

    def iou(self, a: Tensor, b: Tensor) -> Tensor:
        """Intersection over union, elementwise with broadcasting.

        Args:
            a: (..., 4) boxes; ``a[:, None]`` against ``b[None]`` gives the full matrix.
            b: (..., 4) boxes.

        Returns:
            (...) in 0..1; 0 if both boxes are empty.
        """
        intersection = self.intersection(a, b)
        union = self.area(a) + self.area(b) - intersection
        return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)

    def clip(self, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Boxes (..., 4) clipped to images of ``sizes`` (..., 2), each (height, width) in pixels."""
        limit = sizes.flip(-1).to(boxes.dtype) - self.extra
        return torch.minimum(boxes.clamp(min=0), torch.cat([limit, limit], dim=-1))

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., 4) = (dx, dy, dw, dh) from ``anchors`` (..., 4) to ``boxes`` (..., 4), with all weights 1."""
        anchor_w, anchor_h = self.sizes(anchors)
        width, height = self.sizes(boxes)
        dx = (boxes[..., 0] + 0.5 * width - anchors[..., 0] - 0.5 * anchor_w) / anchor_w
        dy = (boxes[..., 1] + 0.5 * height - anchors[..., 1] - 0.5 * anchor_h) / anchor_h
        return torch.stack([dx, dy, torch.log(width / anchor_w), torch.log(height / anchor_h)], dim=-1)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (..., 4) from ``deltas`` (..., 4) relative to ``anchors`` (..., 4); the inverse of :meth:`encode`."""
        anchor_w, anchor_h = self.sizes(anchors)
        x = deltas[..., 0] * anchor_w + anchors[..., 0] + 0.5 * anchor_w
        y = deltas[..., 1] * anchor_h + anchors[..., 1] + 0.5 * anchor_h
        width = deltas[..., 2].clamp(max=_MAX_LOG_SCALE).exp() * anchor_w
        height = deltas[..., 3].clamp(max=_MAX_LOG_SCALE).exp() * anchor_h
        x1, y1 = x - 0.5 * width, y - 0.5 * height
        return torch.stack([x1, y1, x + 0.5 * width - self.extra, y + 0.5 * height - self.extra], dim=-1)

    def from_xywh(self, xywh: Tensor) -> Tensor:
        """Boxes (..., 4) from COCO's (x, y, width, height)."""
        corner = xywh[..., :2]
        return torch.cat([corner, corner + xywh[..., 2:] - self.extra], dim=-1)

    def to_xywh(self, boxes: Tensor) -> Tensor:
        """COCO's (x, y, width, height) from boxes (..., 4)."""
        return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2] + self.extra], dim=-1)

    def flip(self, boxes: Tensor, width: int) -> Tensor:
        """Boxes (..., 4) after a horizontal flip of an image of ``width`` pixels."""
        x1, y1, x2, y2 = boxes.unbind(-1)
        last = width - self.extra
        return torch.stack([last - x2, y1, last - x1, y2], dim=-1)


CONTINUOUS = BoxConvention("continuous", 0.0, "center", aligned=True, sampling_ratio=2, pads_raw=False)
INCLUSIVE = BoxConvention("inclusive", 1.0, "release", aligned=False, sampling_ratio=2, pads_raw=True)
DETECTRON2 = BoxConvention("detectron2", 0.0, "corner", aligned=True, sampling_ratio=0, pads_raw=False)
MMDETECTION = replace(DETECTRON2, name="mmdetection", ranks_probabilities=True)
TORCHVISION = BoxConvention("torchvision", 0.0, "corner_rounded", aligned=False, sampling_ratio=2, pads_raw=False)
CONVENTIONS = {
    convention.name: convention for convention in (CONTINUOUS, INCLUSIVE, DETECTRON2, MMDETECTION, TORCHVISION)
}
