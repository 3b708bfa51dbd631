"""Tensors that describe a whole batch: RoIs, ground truth, the match of the two, and detections.

RoIs of all images are stored in one flat tensor. Each row has a ``valid`` flag, so that a subset can be chosen without
changing a shape: code that runs on a GPU can then proceed without waiting for a count. On a CPU, where counting is
free, :meth:`Rois.compact` drops the invalid rows before expensive layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpm_rcnn.boxes import BoxConvention

_R = TypeVar("_R", bound="Rows")
# Pairs of RoI and object whose IoU is computed at once, which bounds the memory of crowded images.
_CHUNK = 1 << 22


class Rows:
    """Base of dataclasses whose fields are tensors of the same length R."""

    def __len__(self) -> int:
        return len(self._tensors()[0])

    def __getitem__(self: _R, index: Tensor | slice) -> _R:
        """The rows at ``index``: a bool mask (R,), int64 indices (K,) or a slice."""
        return type(self)(*(tensor[index] for tensor in self._tensors()))

    def cat(self: _R, *others: _R) -> _R:
        """These rows and those of ``others``, in this order."""
        return type(self)(*(torch.cat(parts) for parts in zip(*(rows._tensors() for rows in (self, *others)))))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.__dataclass_fields__]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Rois(Rows):
    """Regions of interest of a batch, in any order.

    Attributes:
        boxes: (R, 4) float32, xyxy pixels at network size.
        images: (R,) int64, the index of each RoI's image in the batch.
        valid: (R,) bool; rows that are False have no effect on losses and detections.
    """

    boxes: Tensor
    images: Tensor
    valid: Tensor

    @classmethod
    def of(cls, boxes: Tensor, images: Tensor) -> "Rois":
        """RoIs that are all valid."""
        return cls(boxes, images, torch.ones_like(images, dtype=torch.bool))

    def where(self, mask: Tensor) -> "Rois":
        """The same rows, valid only where ``mask`` (R,) is True too."""
        return Rois(self.boxes, self.images, self.valid & mask)

    def with_boxes(self, boxes: Tensor) -> "Rois":
        """The same rows with other ``boxes`` (R, 4)."""
        return Rois(boxes, self.images, self.valid)

    def compact(self, *others: Any) -> tuple[Any, ...]:
        """These RoIs and ``others``, whose rows belong to them, without the invalid rows."""
        rows = self.valid.nonzero().squeeze(1)
        return (self[rows], *(other[rows] for other in others))


@dataclass(frozen=True)
class Match(Rows):
    """The best-overlapping ground-truth box of each RoI.

    Attributes:
        iou: (R,) float32 in 0..1; -1 where the image has no object.
        boxes: (R, 4) float32, the matched boxes; zeros where the image has no object.
        labels: (R,) int64, the matched labels 1..C; 0 where the image has no object.
    """

    iou: Tensor
    boxes: Tensor
    labels: Tensor


class GroundTruth(NamedTuple):
    """Ground truth of a batch, padded to the same number of objects G per image; G is at least 1.

    Attributes:
        boxes: (B, G, 4) float32, xyxy pixels at network size; zeros where padded.
        labels: (B, G) int64 in 1..C; 0 where padded.
        valid: (B, G) bool, False where padded.
        counts: number of objects of each image, known without waiting for the device. Objects precede the padding.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    counts: tuple[int, ...]

    @classmethod
    def stack(cls, targets: Sequence[dict[str, Tensor]]) -> "GroundTruth":
        """Pad a list of torchvision-style targets.

        Args:
            targets: one dict per image with ``boxes`` (N, 4) in xyxy pixels and ``labels`` (N,) in 1..C.
        """
        counts = tuple(len(target["labels"]) for target in targets)
        most = max(1, *counts)
        device = targets[0]["boxes"].device
        boxes = pad_sequence([t["boxes"].float() for t in targets], batch_first=True)
        labels = pad_sequence([t["labels"].long() for t in targets], batch_first=True)
        missing = most - labels.shape[1]
        if missing:
            boxes, labels = F.pad(boxes, (0, 0, 0, missing)), F.pad(labels, (0, missing))
        valid = torch.arange(most, device=device) < torch.tensor(counts).to(device, non_blocking=True)[:, None]
        return cls(boxes, labels, valid, counts)

    def rois(self) -> Rois:
        """The ground-truth boxes as B * G RoIs, image by image; padding is invalid."""
        images = torch.arange(len(self.boxes), device=self.boxes.device).repeat_interleave(self.boxes.shape[1])
        return Rois(self.boxes.flatten(0, 1), images, self.valid.flatten())


@dataclass(frozen=True)
class Detections(Rows):
    """Detections of a batch.

    Attributes:
        boxes: (D, 4) float32, xyxy pixels at network size; they may extend beyond the image.
        images: (D,) int64, the index of each detection's image in the batch.
        scores: (D,) float32 in 0..1.
        labels: (D,) int64 in 1..C.
    """

    boxes: Tensor
    images: Tensor
    scores: Tensor
    labels: Tensor


def match_rois(rois: Rois, ground_truth: GroundTruth, convention: BoxConvention) -> Match:
    """Match every RoI with the ground-truth box of its own image that it overlaps most."""
    step = max(1, _CHUNK // ground_truth.boxes.shape[1])
    # A batch without RoIs is one empty chunk.
    first, *rest = [
        _match_chunk(rois[start : start + step], ground_truth, convention)
        for start in range(0, max(1, len(rois)), step)
    ]
    return first.cat(*rest)


def _match_chunk(rois: Rois, ground_truth: GroundTruth, convention: BoxConvention) -> Match:
    iou = convention.iou(rois.boxes[:, None], ground_truth.boxes[rois.images])
    best, index = iou.masked_fill(~ground_truth.valid[rois.images], -1.0).max(dim=1)
    return Match(best, ground_truth.boxes[rois.images, index], ground_truth.labels[rois.images, index])
