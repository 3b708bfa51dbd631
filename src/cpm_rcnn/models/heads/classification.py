"""The branch that names what is in a box: used once on the proposals, and by RSM again on the refined boxes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from cpm_rcnn.models.init import init_linear, init_predictor
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.pooling import PyramidRoIAlign
from cpm_rcnn.models.structures import Rois, grouped_nms
from cpm_rcnn.boxes import BoxConvention

_POOLED_SIZE = 7


class Classifier(nn.Module):
    """RoIAlign 7x7, two FC layers with ReLU, one linear layer over background and classes (spec section 4).

    Args:
        in_channels: channels of the pyramid.
        strides: strides of the levels pooled from, in pixels.
        mlp_channels: width of the FC layers.
        num_classes: foreground classes; class 0 is background.
        convention: the pixel convention.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        mlp_channels: int,
        num_classes: int,
        convention: BoxConvention,
    ) -> None:
        super().__init__()
        self.pool = PyramidRoIAlign(_POOLED_SIZE, strides, convention)
        self.mlp = TwoMLPHead(in_channels * _POOLED_SIZE**2, mlp_channels)
        self.predictor = nn.Linear(mlp_channels, num_classes + 1)
        init_linear(self.mlp)
        init_predictor(self.predictor)

    def forward(self, features: Sequence[Tensor], rois: Rois) -> Tensor:
        """Logits (R, C + 1) for ``rois`` on ``features``."""
        return self.predictor(self.mlp(self.pool(features, rois)))


def classification_loss(logits: Tensor, labels: Tensor) -> LossTerm:
    """Cross-entropy over RoIs, in float32; ``logits`` (R, C + 1), ``labels`` (R,) int64 0..C."""
    return LossTerm(F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels))


def select_detections(
    probabilities: Tensor, rois: Rois, *, score_threshold: float, nms_iou: float
) -> tuple[Rois, Tensor, Tensor]:
    """Every (RoI, class) pair above the threshold that survives its class's NMS; best score first.

    Args:
        probabilities: (R, C + 1) float32, class 0 = background.
        rois: R boxes.
        score_threshold: pairs at or below it are dropped.
        nms_iou: of two overlapping boxes of one class and image, above this IoU the lower one goes.

    Returns:
        The kept boxes as RoIs (K), their scores (K,) and labels (K,) int64 1..C.
    """
    rows, labels = (probabilities[:, 1:] > score_threshold).nonzero(as_tuple=True)
    labels = labels + 1
    candidates, scores = rois.keep(rows), probabilities[rows, labels]
    group = candidates.images * probabilities.shape[1] + labels
    kept = grouped_nms(candidates.boxes, scores, group, nms_iou)
    return candidates.keep(kept), scores[kept], labels[kept]


def probability_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax probability (R,) float32 of each RoI's own label; ``logits`` (R, C + 1), ``labels`` (R,)."""
    return torch.softmax(logits.float(), dim=1).gather(1, labels[:, None]).squeeze(1)
