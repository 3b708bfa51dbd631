"""The classification branch, applied to the proposals and, in RSM, to the refined boxes (docs/method.md section 4)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from cpm_rcnn.models.heads.inputs import HeadInputs
from cpm_rcnn.models.host import read, reads_are_free, rows_where
from cpm_rcnn.models.init import init_linear, init_predictor
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.nms import grouped_nms
from cpm_rcnn.models.pooling import PyramidRoIAlign
from cpm_rcnn.models.sampling import rank_in_group
from cpm_rcnn.models.structures import Rois, count_per_image

_POOLED_SIZE = 7
# The label that cross_entropy ignores.
_IGNORED = -100
# On an accelerator, the NMS gets at most so many pairs of RoI and class: this number per RoI, but at least this number
# altogether. If more exceed the threshold, the selection is repeated with all of them.
_CANDIDATES_PER_ROI, _MIN_CANDIDATES = 4, 8192


class Classifier(nn.Module):
    """RoIAlign 7x7, two FC layers with ReLU, and a linear layer over background and classes.

    Args:
        inputs: channels and strides of the pyramid, number of classes, and box convention.
        mlp_channels: width of the FC layers.
    """

    def __init__(self, inputs: HeadInputs, mlp_channels: int) -> None:
        super().__init__()
        self.pool = PyramidRoIAlign(_POOLED_SIZE, inputs.strides, inputs.convention)
        self.mlp = TwoMLPHead(inputs.channels * _POOLED_SIZE**2, mlp_channels)
        self.predictor = nn.Linear(mlp_channels, inputs.num_classes + 1)
        init_linear(self.mlp)
        init_predictor(self.predictor)

    def forward(self, features: Sequence[Tensor], rois: Rois) -> Tensor:
        """Logits (R, C + 1) of R ``rois`` on the pyramid ``features``; class 0 is background."""
        return self.predictor(self.mlp(self.pool(features, rois)))


def classification_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> LossTerm:
    """Cross-entropy over the valid RoIs, in float32.

    Args:
        logits: (R, C + 1).
        labels: (R,) int64 in 0..C.
        valid: (R,) bool.
    """
    labels = labels.masked_fill(~valid, _IGNORED)
    return LossTerm(F.cross_entropy(logits.float(), labels, ignore_index=_IGNORED, reduction="sum"), valid.sum())


class Selection(NamedTuple):
    """K pairs of RoI and class, best score first.

    Attributes:
        rois: K RoIs with their boxes.
        scores: (K,) float32 probabilities.
        labels: (K,) int64 in 1..C.
        rows: (K,) int64, the index of each pair's RoI among the given ones.

    All of them are valid. On an accelerator, ``rois.at_most`` are their numbers per image.
    """

    rois: Rois
    scores: Tensor
    labels: Tensor
    rows: Tensor


def select_detections(
    probabilities: Tensor,
    rois: Rois,
    boxes: Tensor | None = None,
    *,
    score_threshold: float,
    nms_iou: float,
    max_detections: int | None = None,
) -> Selection:
    """The pairs of RoI and class that exceed the score threshold and remain after NMS per class.

    On an accelerator, this is where a test waits for the device: the host reads how many pairs remain, so that the
    layers after it compute no others. If more pairs exceed the threshold than the NMS got, it repeats both.

    Args:
        probabilities: (R, C + 1) float32; class 0 is background.
        rois: R RoIs; on an accelerator, their ``image_sizes`` must be known.
        boxes: (R, C, 4), the box of each RoI and class, or (R, 1, 4), one for all classes; None: the RoIs' own.
        score_threshold: only pairs with a higher score are candidates.
        nms_iou: of two boxes of one class and image that overlap more than this, the lower-scored one is dropped.
        max_detections: maximum number of pairs per image, which needs ``rois.image_sizes``; None has no limit.
    """
    candidate = (probabilities[:, 1:] > score_threshold) & rois.valid[:, None]
    select = partial(_select, candidate, probabilities, rois, boxes, nms_iou, max_detections)
    # A symbol in an exported graph, which has no use for it.
    at_most: int = torch.sym_max(_CANDIDATES_PER_ROI * rois.valid.shape[0], _MIN_CANDIDATES)  # type: ignore[assignment]
    selected, counts = select(at_most), None
    if not reads_are_free(candidate):
        candidates, *counts = _read_counts(candidate, selected.rois)
        if candidates > at_most:
            selected = select(candidates)
            _, *counts = _read_counts(candidate, selected.rois)
    chosen = selected.rois.where(selected.rois.valid, at_most=counts)
    return Selection(*chosen.compact(selected.scores, selected.labels, selected.rows))


def _select(
    candidate: Tensor,
    probabilities: Tensor,
    rois: Rois,
    boxes: Tensor | None,
    nms_iou: float,
    max_detections: int | None,
    at_most: int,
) -> Selection:
    """The selection from at most ``at_most`` of the pairs where ``candidate`` (R, C) is True; others are invalid."""
    pairs = rows_where(candidate.flatten(), at_most)
    rows, columns = pairs.div(candidate.shape[1], rounding_mode="floor"), pairs % candidate.shape[1]
    labels = columns + 1
    chosen, scores = rois[rows].where(candidate[rows, columns]), probabilities[rows, labels]
    if boxes is not None:
        chosen = chosen.with_boxes(boxes[rows, columns if boxes.shape[1] > 1 else 0])
    group = chosen.images * probabilities.shape[1] + labels
    order, kept = grouped_nms(chosen.boxes, scores, group, nms_iou, chosen.valid)
    chosen, scores = chosen[order].where(kept), scores[order]
    if max_detections is not None:
        assert rois.image_sizes is not None
        # Rows that are not valid come last.
        key = torch.where(chosen.valid, -scores, torch.inf)
        rank, _ = rank_in_group(key, chosen.images, rois.image_sizes.shape[0])
        chosen = chosen.where(rank < max_detections)
    return Selection(chosen, scores, labels[order], rows[order])


def _read_counts(candidate: Tensor, selected: Rois) -> list[int]:
    """The number of candidates, and the number of valid RoIs in each image; waits for the device."""
    assert selected.image_sizes is not None
    num_images = len(selected.image_sizes)
    counts = count_per_image(selected.images.masked_fill(~selected.valid, num_images), num_images + 1)
    return read(torch.cat([candidate.sum().view(1), counts[:num_images]])).tolist()


def probability_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax probability (R,) float32 of each RoI's own label; ``logits`` (R, C + 1), ``labels`` (R,)."""
    return torch.softmax(logits.float(), dim=1).gather(1, labels[:, None]).squeeze(1)
