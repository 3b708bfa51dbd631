"""ISM and RSM: scores that follow the quality of the box (paper sections 3.3 and 3.4, spec sections 6 and 7)."""

import torch
from torch import Tensor, nn

from cpm_rcnn.models.heads.classification import probability_of
from cpm_rcnn.models.init import init_linear, init_predictor
from cpm_rcnn.models.losses import LossTerm

_MLP_CHANNELS = 1024
# score <- score^0.8 * p^0.2 (spec section 7).
_RESCORE_POWER = 0.2


class InstanceScorer(nn.Module):
    """ISM: predicts (1 - IoU, IoU) of a grid stage's RoI from the stage's point features.

    Args:
        in_features: values of the point features of one RoI: 9 points x channels x 7 x 7.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, _MLP_CHANNELS),
            nn.ReLU(inplace=True),
            nn.Linear(_MLP_CHANNELS, _MLP_CHANNELS),
            nn.ReLU(inplace=True),
        )
        self.predictor = nn.Linear(_MLP_CHANNELS, 2)
        init_linear(self.mlp)
        init_predictor(self.predictor)

    def forward(self, point_features: Tensor) -> Tensor:
        """(R, 2) predictions from ``point_features`` (R, 9 * channels, 7, 7)."""
        return self.predictor(self.mlp(point_features.flatten(1)))


def instance_score_loss(predictions: Tensor, iou: Tensor) -> LossTerm:
    """Squared error to (1 - IoU, IoU), summed over the two outputs; ``predictions`` (R, 2), ``iou`` (R,) 0..1."""
    target = torch.stack([1 - iou, iou], dim=1)
    return LossTerm((predictions.float() - target).square().sum(), len(iou))


def instance_rescale(scores: Tensor, predictions: Tensor) -> Tensor:
    """ISM at test: scores (R,) times the predicted IoU, held in 0..1; ``predictions`` (R, 2)."""
    return scores * predictions[:, 1].float().clamp(0, 1)


def rescore(scores: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """RSM at test: scores (R,) mixed with the refined boxes' probability; ``logits`` (R, C + 1), ``labels`` (R,)."""
    return scores.pow(1 - _RESCORE_POWER) * probability_of(logits, labels).pow(_RESCORE_POWER)
