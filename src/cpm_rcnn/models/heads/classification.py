"""The classification branch, applied to the proposals and, in RSM, to the refined boxes (docs/method.md section 4)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from cpm_rcnn.models.heads.inputs import HeadInputs
from cpm_rcnn.models.init import init_linear, init_predictor
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.nms import grouped_nms
from cpm_rcnn.models.pooling import PyramidRoIAlign
from cpm_rcnn.models.sampling import rank_in_group
from cpm_rcnn.models.structures import Rois

_POOLED_SIZE = 7
# The label that cross_entropy ignores.
_IGNORED = -100


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

    Args:
        probabilities: (R, C + 1) float32; class 0 is background.
        rois: R RoIs.
        boxes: (R, C, 4), the box of each RoI and class, or (R, 1, 4), one for all classes; None: the RoIs' own.
        score_threshold: only pairs with a higher score are candidates.
        nms_iou: of two boxes of one class and image that overlap more than this, the lower-scored one is dropped.
        max_detections: maximum number of pairs per image, which needs ``rois.image_sizes``; None has no limit.
    """
    candidate = (probabilities[:, 1:] > score_threshold) & rois.valid[:, None]
    rows, columns = candidate.nonzero(as_tuple=True)
    labels = columns + 1
    candidates, scores = rois[rows], probabilities[rows, labels]
    if boxes is not None:
        candidates = candidates.with_boxes(boxes[rows, columns if boxes.shape[1] > 1 else 0])
    group = candidates.images * probabilities.shape[1] + labels
    kept = grouped_nms(candidates.boxes, scores, group, nms_iou)
    if max_detections is not None:
        assert rois.image_sizes is not None
        rank, _ = rank_in_group(-scores[kept], candidates.images[kept], len(rois.image_sizes))
        kept = kept[rank < max_detections]
    return Selection(candidates[kept], scores[kept], labels[kept], rows[kept])


def probability_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax probability (R,) float32 of each RoI's own label; ``logits`` (R, C + 1), ``labels`` (R,)."""
    return torch.softmax(logits.float(), dim=1).gather(1, labels[:, None]).squeeze(1)
