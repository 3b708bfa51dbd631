"""Tensors that describe a whole batch: RoIs, ground truth, the match between the two, and detections.

RoIs of all images are stored in one flat tensor. Each row has a ``valid`` flag, so that a subset can be selected
without changing a shape, which would make the host wait for an accelerator. :meth:`Rois.compact` drops invalid rows
before expensive layers, as far as the host knows how many there are.

"Pixels at network size" are pixels of the resized images that the network receives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.models.host import from_host, reads_are_free, rows_where

_R = TypeVar("_R", bound="Rows")
# Pairs of RoI and object whose IoU is computed at once, which bounds the memory of crowded images.
_CHUNK = 1 << 22


class Rows:
    """Base of dataclasses whose fields are tensors of the same length R, except for those named in ``_shared``.

    A field may be None, as in rows without this column.
    """

    _shared: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        return len(getattr(self, self._row_names()[0]))

    def __getitem__(self: _R, index: Tensor | slice) -> _R:
        """The rows at ``index``, which is a bool mask (R,), int64 indices (K,) or a slice."""
        return self._replace({name: getattr(self, name)[index] for name in self._row_names()})

    def cat(self: _R, *others: _R) -> _R:
        """Concatenate these rows and those of ``others``, in this order."""
        names = self._row_names()
        return self._replace({name: torch.cat([getattr(rows, name) for rows in (self, *others)]) for name in names})

    def _row_names(self) -> list[str]:
        names = [name for name in self.__dataclass_fields__ if name not in self._shared]  # type: ignore[attr-defined]
        return [name for name in names if getattr(self, name) is not None]

    def _replace(self: _R, changes: dict[str, Tensor]) -> _R:
        return replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class Rois(Rows):
    """Regions of interest of a batch, in any order.

    Attributes:
        boxes: (R, 4) float32, xyxy pixels at network size.
        images: (R,) int64, the index of each RoI's image in the batch.
        valid: (R,) bool; rows that are False have no effect on losses and detections.
        image_sizes: (B, 2) int64, height and width in pixels of the images of the batch, without padding; None if they
            are not known. The proposals of the RPN know them.
        at_most: an upper bound of the number of valid rows of each image that is known without waiting for the device;
            None if there is none.
    """

    _shared = ("image_sizes", "at_most")

    boxes: Tensor
    images: Tensor
    valid: Tensor
    image_sizes: Tensor | None = None
    at_most: tuple[int, ...] | None = None

    @classmethod
    def of(cls, boxes: Tensor, images: Tensor, image_sizes: Tensor | None = None) -> "Rois":
        """RoIs from ``boxes`` (R, 4) and ``images`` (R,), all of them valid."""
        return cls(boxes, images, torch.ones_like(images, dtype=torch.bool), image_sizes)

    def __getitem__(self, index: Tensor | slice) -> "Rois":
        return replace(super().__getitem__(index), at_most=None)  # indices can repeat a row

    def cat(self, *others: "Rois") -> "Rois":
        """Concatenate these rows and those of ``others``, in this order."""
        bounds = [rois.at_most for rois in (self, *others)]
        known = [bound for bound in bounds if bound is not None]
        at_most = tuple(map(sum, zip(*known, strict=True))) if len(known) == len(bounds) else None
        return replace(super().cat(*others), at_most=at_most)

    def where(self, mask: Tensor, at_most: Sequence[int] | int | None = None) -> "Rois":
        """The same rows, valid only where ``mask`` (R,) is True too.

        Args:
            mask: (R,) bool.
            at_most: an upper bound of the number of valid rows that remain, per image or the same for all images.
        """
        return replace(self, valid=self.valid & mask, at_most=_tighter(self.at_most, at_most))

    def with_boxes(self, boxes: Tensor) -> "Rois":
        """The same rows with other ``boxes`` (R, 4)."""
        return replace(self, boxes=boxes)

    def clip(self, convention: BoxConvention) -> "Rois":
        """The same rows with boxes clipped to their images."""
        assert self.image_sizes is not None
        return self.with_boxes(convention.clip(self.boxes, self.image_sizes[self.images]))

    def compact(self, *others: Any) -> tuple[Any, ...]:
        """Drop invalid rows of these RoIs and the same rows of ``others``, which have one row per RoI.

        On a CPU all invalid rows are dropped. On an accelerator as many rows remain as ``at_most`` allows to be valid,
        or all without this bound, so that the host does not wait. Valid rows keep their order and come first if rows
        are dropped.

        Returns:
            The remaining RoIs, followed by the remaining rows of each of ``others``.
        """
        most = self.valid.shape[0]  # an exported graph has no len()
        bound = most if self.at_most is None else sum(self.at_most)
        if not reads_are_free(self.valid) and bound >= most:
            return (self, *others)
        rows = rows_where(self.valid, bound)
        return (replace(self[rows], at_most=self.at_most), *(other[rows] for other in others))


def _tighter(known: tuple[int, ...] | None, at_most: Sequence[int] | int | None) -> tuple[int, ...] | None:
    """The smaller of two bounds for each image; an int is the same bound for all images."""
    if known is None:
        return tuple(at_most) if isinstance(at_most, Sequence) else None
    if at_most is None:
        return known
    bounds = at_most if isinstance(at_most, Sequence) else [at_most] * len(known)
    return tuple(map(min, zip(known, bounds, strict=True)))


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
        valid = torch.arange(most, device=device) < from_host(counts, labels)[:, None]
        return cls(boxes, labels, valid, counts)

    def rois(self) -> Rois:
        """The ground-truth boxes as B * G RoIs in the order of the images; padded rows are invalid."""
        images = torch.arange(len(self.boxes), device=self.boxes.device).repeat_interleave(self.boxes.shape[1])
        return Rois(self.boxes.flatten(0, 1), images, self.valid.flatten(), at_most=self.counts)


# The columns of detections that say how a score was computed.
DETAILS = ("class_scores", "predicted_iou", "rsm_probability")


@dataclass(frozen=True)
class Detections(Rows):
    """Detections of a batch.

    The columns named in :data:`DETAILS` say how a score was computed. A head that has computed such a value refers to
    it here, which costs nothing; the model drops these columns unless they are requested.

    Attributes:
        boxes: (D, 4) float32, xyxy pixels at network size; they may extend beyond the image.
        images: (D,) int64, the index of each detection's image in the batch.
        scores: (D,) float32 in 0..1.
        labels: (D,) int64 in 1..C.
        valid: (D,) bool; rows that are False are not detections.
        class_scores: (D,) float32 in 0..1, the probability of the label before ISM and RSM; None if the head does not
            give it.
        predicted_iou: (D,) float32 in 0..1, the IoU that ISM predicts; None if ISM is not part of the head or was
            skipped.
        rsm_probability: (D,) float32 in 0..1, RSM's probability of the label; None without RSM.
        counts: number of detections of each image, if it is known without waiting for the device; all rows are valid
            then. None if it is not known.
    """

    _shared = ("counts",)

    boxes: Tensor
    images: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor
    class_scores: Tensor | None = None
    predicted_iou: Tensor | None = None
    rsm_probability: Tensor | None = None
    counts: tuple[int, ...] | None = None

    def __getitem__(self, index: Tensor | slice) -> "Detections":
        return replace(super().__getitem__(index), counts=None)

    def cat(self, *others: "Detections") -> "Detections":
        """Concatenate these rows and those of ``others``, in this order."""
        return replace(super().cat(*others), counts=None)

    def without_details(self) -> "Detections":
        """The same detections without the columns of :data:`DETAILS`."""
        return replace(self, class_scores=None, predicted_iou=None, rsm_probability=None)


def count_per_image(images: Tensor, num_images: int) -> Tensor:
    """How often each of 0 .. num_images - 1 occurs in ``images`` (R,) int64: (num_images,) int64, without waiting."""
    return images.new_zeros(num_images).index_add(0, images, torch.ones_like(images))


def match_rois(rois: Rois, ground_truth: GroundTruth, convention: BoxConvention) -> Match:
    """Match every RoI with the ground-truth box of its image that has the highest IoU with it."""
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
