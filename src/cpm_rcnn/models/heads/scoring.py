"""ISM and RSM: scores that reflect the quality of the box.

See sections 3.3 and 3.4 of the paper and docs/method.md sections 6 and 7.

Both work with any list of stages. ISM uses the features of the last stage; RSM pools from the pyramid again, at the
refined boxes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpm_rcnn.models.heads.classification import Classifier, classification_loss, probability_of
from cpm_rcnn.models.heads.inputs import HeadInputs
from cpm_rcnn.models.heads.roi_sampling import sample_rois
from cpm_rcnn.models.init import init_linear, init_predictor
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import GroundTruth, Match, Rois

_MLP_CHANNELS = 1024
# score <- score^0.8 * p^0.2 (docs/method.md section 7).
_RESCORE_POWER = 0.2


class InstanceScoring(nn.Module):
    """ISM: predicts (1 - IoU, IoU) of a stage's RoI from the stage's features.

    Args:
        in_features: number of values in the stage's features of one RoI.
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

    def forward(self, stage_features: Tensor) -> Tensor:
        """Predictions (R, 2) from ``stage_features`` (R, ...)."""
        return self.predictor(self.mlp(stage_features.flatten(1)))

    def loss(self, stage_features: Tensor, rois: Rois, match: Match) -> LossTerm:
        """The loss of the R ``rois`` that entered the stage; the target is the IoU of their ``match``."""
        return instance_score_loss(self(stage_features), match.iou, rois.valid)

    def rescale(self, scores: Tensor, stage_features: Tensor) -> Tensor:
        """Test-time scores (R,) multiplied by the predicted IoU."""
        return instance_rescale(scores, self(stage_features))


class Rescoring(Classifier):
    """RSM: a second classification branch, for the refined boxes.

    Args:
        inputs: channels and strides of the pyramid, number of classes, and box convention.
        mlp_channels: width of the FC layers.
        samples: maximum number of RoIs per image that train the branch.
    """

    def __init__(self, inputs: HeadInputs, mlp_channels: int, samples: int) -> None:
        super().__init__(inputs, mlp_channels)
        self.samples = samples
        self.convention = inputs.convention

    def loss(self, features: Sequence[Tensor], rois: Rois, ground_truth: GroundTruth) -> LossTerm:
        """The loss on a new sample of RoIs.

        Args:
            features: the pyramid.
            rois: the RoIs that entered the last stage and, if those are positives only, the negatives that trained the
                first classification branch.
            ground_truth: ground truth of the batch.
        """
        sampled = sample_rois(rois, ground_truth, self.convention, self.samples)
        return classification_loss(self(features, sampled.rois), sampled.labels, sampled.rois.valid)

    def rescore(self, scores: Tensor, labels: Tensor, features: Sequence[Tensor], rois: Rois) -> Tensor:
        """Test-time scores (R,) combined with the probability of each label (R,) at the refined ``rois``."""
        return rescore(scores, self(features, rois), labels)


def instance_score_loss(predictions: Tensor, iou: Tensor, valid: Tensor) -> LossTerm:
    """Squared error to (1 - IoU, IoU), summed over both outputs and the valid RoIs.

    Args:
        predictions: (R, 2).
        iou: (R,) in 0..1; -1, for an image without objects, counts as 0.
        valid: (R,) bool.
    """
    iou = iou.clamp(min=0)
    target = torch.stack([1 - iou, iou], dim=1)
    error = torch.where(valid[:, None], predictions.float() - target, 0.0)
    return LossTerm(error.square().sum(), valid.sum())


def instance_rescale(scores: Tensor, predictions: Tensor) -> Tensor:
    """Scores (R,) times the predicted IoU, clamped to 0..1; ``predictions`` (R, 2)."""
    return scores * predictions[:, 1].float().clamp(0, 1)


def rescore(scores: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """``scores^0.8 * p^0.2``, where p is the probability of the label; scores (R,), logits (R, C + 1), labels (R,)."""
    return scores.pow(1 - _RESCORE_POWER) * probability_of(logits, labels).pow(_RESCORE_POWER)
