"""ISM and RSM: scores that reflect the quality of the box.

See sections 3.3 and 3.4 of the paper and docs/method.md sections 6 and 7.

Both work with any list of stages. ISM uses the features of the last stage; RSM pools from the pyramid again, at the
refined boxes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpm_rcnn.models.finite import check_output
from cpm_rcnn.models.heads.classification import Classifier, classification_loss, probability_of
from cpm_rcnn.models.heads.inputs import HeadInputs
from cpm_rcnn.models.heads.roi_sampling import sample_rois
from cpm_rcnn.models.init import init_linear, init_predictor
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import Detections, GroundTruth, Match, Rois

_MLP_CHANNELS = 1024
# score <- score^0.8 * p^0.2 (docs/method.md section 7).
_RESCORE_POWER = 0.2


class InstanceScoring(nn.Module):
    """ISM: predicts (1 - IoU, IoU) of a stage's RoI from the stage's features.

    Args:
        in_features: number of values in the stage's features of one RoI.
        weights: weights of the RoIs in the loss: ``equal``, or ``release`` (:func:`release_weights`).
    """

    def __init__(self, in_features: int, weights: str = "equal") -> None:
        super().__init__()
        self.weights = weights
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
        weights = None if self.weights == "equal" else release_weights(rois, match)
        return instance_score_loss(self(stage_features), match.iou, rois.valid, weights)

    def predicted_iou(self, stage_features: Tensor) -> Tensor:
        """The predicted IoU (R,) float32 of each RoI, clamped to 0..1, by which test-time scores are multiplied."""
        return predicted_iou(self(stage_features))


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

    def probability(self, labels: Tensor, features: Sequence[Tensor], rois: Rois) -> Tensor:
        """The probability (R,) float32 of each label (R,) at the refined ``rois``, for :func:`rescore`."""
        return probability_of(self(features, rois), labels)


def calibrated_detections(
    rois: Rois,
    class_scores: Tensor,
    labels: Tensor,
    features: Sequence[Tensor],
    stage_features: Tensor,
    *,
    ism: InstanceScoring | None,
    rsm: Rescoring | None,
) -> Detections:
    """Detections whose classification scores are corrected by ISM and then by RSM; either can be None.

    Args:
        rois: R RoIs with their final boxes.
        class_scores: (R,) float32 probabilities.
        labels: (R,) int64 in 1..C.
        features: the pyramid.
        stage_features: (R, ...), features of the last stage.
        ism: predicts the IoU from ``stage_features``.
        rsm: classifies the boxes of ``rois``.

    Raises:
        UserError: a score is not finite.
    """
    scores, iou, probability = class_scores, None, None
    if ism is not None:
        iou = ism.predicted_iou(stage_features)
        scores = scores * iou
        check_output("head.ism", ism, scores)
    if rsm is not None:
        probability = rsm.probability(labels, features, rois)
        scores = rescore(scores, probability)
        check_output("head.rsm", rsm, scores)
    return Detections(
        *(rois.boxes, rois.images, scores, labels, rois.valid),
        class_scores=class_scores,
        predicted_iou=iou,
        rsm_probability=probability,
    )


def instance_score_loss(predictions: Tensor, iou: Tensor, valid: Tensor, weights: Tensor | None = None) -> LossTerm:
    """Squared error to (1 - IoU, IoU), summed over both outputs and the valid RoIs.

    Args:
        predictions: (R, 2).
        iou: (R,) in 0..1; -1, for an image without objects, counts as 0.
        valid: (R,) bool.
        weights: (R,) factors of the errors; None is 1 for all.
    """
    iou = iou.clamp(min=0)
    target = torch.stack([1 - iou, iou], dim=1)
    error = torch.where(valid[:, None], predictions.float() - target, 0.0).square()
    if weights is not None:
        error = error * weights[:, None]
    return LossTerm(error.sum(), valid.sum())


def release_weights(rois: Rois, match: Match) -> Tensor:
    """Approximate weights (R,) of the RoIs in the release's ISM loss (docs/method.md section 11).

    An indexing error of the release gives about half of the loss to the first two RoIs of the first image, about half
    of the usual weight to the others, and less to RoIs that equal their ground-truth box. With about 40 RoIs, the three
    weights are 10, 0.5 and 0.3.

    Args:
        rois: R RoIs.
        match: their ground truth.
    """
    is_ground_truth = (rois.boxes == match.boxes).all(dim=1)
    weights = torch.where(is_ground_truth, 0.3, 0.5)
    # Invalid rows come last.
    image = rois.images.masked_fill(~rois.valid, torch.iinfo(torch.int64).max)
    first_two = image.argsort(stable=True)[:2]
    return weights.index_add(0, first_two, (rois.valid.sum() / 4).expand(len(first_two)))


def predicted_iou(predictions: Tensor) -> Tensor:
    """The predicted IoU (R,) float32, clamped to 0..1, in ISM's ``predictions`` (R, 2)."""
    return predictions[:, 1].float().clamp(0, 1)


def rescore(scores: Tensor, probability: Tensor) -> Tensor:
    """``scores^0.8 * p^0.2``, where p is RSM's probability of the label; scores (R,), probability (R,)."""
    return scores.pow(1 - _RESCORE_POWER) * probability.pow(_RESCORE_POWER)
