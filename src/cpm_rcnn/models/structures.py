"""Boxes of a whole batch in one flat tensor, the padded ground truth beside it, and the matching of the two."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import batched_nms

from cpm_rcnn.boxes import BoxConvention


class Rois(NamedTuple):
    """Regions of interest of a batch, image after image or in any order.

    Attributes:
        boxes: (R, 4) float32 xyxy pixels at network size.
        images: (R,) int64, the image of the batch that each belongs to.
    """

    boxes: Tensor
    images: Tensor

    def keep(self, mask: Tensor) -> "Rois":
        """Those where ``mask`` (R,) is true, or those at the indices ``mask`` (K,)."""
        return Rois(self.boxes[mask], self.images[mask])

    def join(self, other: "Rois") -> "Rois":
        """Both, ``other`` after these."""
        return Rois(torch.cat([self.boxes, other.boxes]), torch.cat([self.images, other.images]))


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within each group, plain areas.

    Args:
        boxes: (R, 4) xyxy pixels.
        scores: (R,).
        groups: (R,) int64; boxes of different groups leave each other alone.
        iou_threshold: of two boxes that overlap more, the lower-scored one goes.

    Returns:
        (K,) int64 indices of the survivors, best score first.
    """
    # batched_nms tells groups apart by moving each by whole images; in float32 that would round the coordinates.
    # Apple's GPUs have nothing wider.
    dtype = torch.float32 if boxes.device.type == "mps" else torch.float64
    return batched_nms(boxes.to(dtype), scores.to(dtype), groups, iou_threshold)


class GroundTruth(NamedTuple):
    """Ground truth of a batch, padded to the same number of objects an image (at least one row, so no case is special).

    Attributes:
        boxes: (B, G, 4) float32 xyxy pixels at network size; zeros where padded.
        labels: (B, G) int64 1..C; 0 where padded.
        valid: (B, G) bool, false where padded.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor

    @classmethod
    def stack(cls, targets: Sequence[dict[str, Tensor]]) -> "GroundTruth":
        """Pad a list of torchvision-style targets: ``boxes`` (N, 4) xyxy pixels and ``labels`` (N,) 1..C an image."""
        counts = [len(target["labels"]) for target in targets]
        most = max(1, *counts)
        device = targets[0]["boxes"].device
        boxes = pad_sequence([t["boxes"].float() for t in targets], batch_first=True)
        labels = pad_sequence([t["labels"].long() for t in targets], batch_first=True)
        missing = most - labels.shape[1]
        if missing:
            boxes = torch.nn.functional.pad(boxes, (0, 0, 0, missing))
            labels = torch.nn.functional.pad(labels, (0, missing))
        valid = torch.arange(most, device=device) < torch.tensor(counts).to(device, non_blocking=True)[:, None]
        return cls(boxes, labels, valid)

    def rois(self) -> Rois:
        """The ground-truth boxes themselves as RoIs."""
        images, rows = self.valid.nonzero(as_tuple=True)
        return Rois(self.boxes[images, rows], images)


class Match(NamedTuple):
    """Each RoI's best ground truth.

    Attributes:
        iou: (R,) float32; -1 where the image has no object.
        boxes: (R, 4) the matched boxes; zeros where the image has no object.
        labels: (R,) int64 the matched labels 1..C; 0 where the image has no object.
    """

    iou: Tensor
    boxes: Tensor
    labels: Tensor

    def keep(self, mask: Tensor) -> "Match":
        """Those where ``mask`` (R,) is true, or those at the indices ``mask`` (K,)."""
        return Match(self.iou[mask], self.boxes[mask], self.labels[mask])


def match_rois(rois: Rois, truth: GroundTruth, convention: BoxConvention) -> Match:
    """Match every RoI with the ground-truth box of its own image that it overlaps most."""
    iou = convention.iou(rois.boxes[:, None], truth.boxes[rois.images])
    best, index = iou.masked_fill(~truth.valid[rois.images], -1.0).max(dim=1)
    return Match(best, truth.boxes[rois.images, index], truth.labels[rois.images, index])
