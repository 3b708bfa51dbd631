"""A box stage: classifies each RoI and predicts its box by regression (Faster R-CNN, Cascade R-CNN)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpm_rcnn.models.heads.classification import Classifier, classification_loss
from cpm_rcnn.models.heads.inputs import HeadInputs
from cpm_rcnn.models.heads.refinement import RefinementStage
from cpm_rcnn.models.init import init_regressor
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import Match, Rois
from cpm_rcnn.settings import Settings, architecture, list_of, number, training

# Between the plain L1 of detectron2's models and the 1 of the Cascade R-CNN paper; torchvision's value.
_SMOOTH_L1_BETA = 1 / 9


@dataclass(frozen=True)
class BoxStageSettings(Settings):
    """Settings of one box stage.

    Attributes:
        positive_iou: minimum IoU with an object of the stage's positives in training, 0..1.
        coder_weights: factors of the deltas (dx, dy, dw, dh), which give them about unit variance.
        loss_weight: weight of the stage's losses.
    """

    positive_iou: float = training(0.5, check=number(0, 1))
    coder_weights: Sequence[float] = architecture((10, 10, 5, 5), check=list_of(number(1e-3), 4))
    loss_weight: float = training(1.0, check=number(0))


class BoxOutput(NamedTuple):
    """The predictions of a box stage for R RoIs.

    Attributes:
        features: (R, channels, 7, 7), pooled features; ISM uses them.
        logits: (R, C + 1); class 0 is background.
        deltas: (R, K, 4) float32, weighted (dx, dy, dw, dh); K is the number of classes, or 1 if it is class-agnostic.
    """

    features: Tensor
    logits: Tensor
    deltas: Tensor


class BoxStage(RefinementStage):
    """Two FC layers on pooled features, a classifier over background and classes, and a box regressor.

    Args:
        settings: IoU threshold, coder weights and loss weight.
        inputs: channels and strides of the pyramid, number of classes, and box convention.
        mlp_channels: width of the FC layers.
        class_agnostic: whether one box is predicted per RoI, instead of one per RoI and class.
    """

    coder_weights: Tensor

    def __init__(
        self, settings: BoxStageSettings, inputs: HeadInputs, *, mlp_channels: int, class_agnostic: bool
    ) -> None:
        super().__init__()
        self.settings = settings
        self.convention = inputs.convention
        self.classifier = Classifier(inputs, mlp_channels)
        self.regressor = nn.Linear(mlp_channels, 4 if class_agnostic else 4 * inputs.num_classes)
        init_regressor(self.regressor)
        self.register_buffer(
            "coder_weights", torch.tensor(settings.coder_weights, dtype=torch.float32), persistent=False
        )

    def forward(self, features: Sequence[Tensor], rois: Rois) -> BoxOutput:
        """Classify and regress R ``rois`` on the pyramid ``features``."""
        pooled = self.classifier.pool(features, rois)
        embedded = self.classifier.mlp(pooled)
        deltas = self.regressor(embedded).float().unflatten(1, (-1, 4))
        return BoxOutput(pooled, self.classifier.predictor(embedded), deltas)

    def boxes(self, output: BoxOutput, rois: Rois) -> Tensor:
        """The predicted boxes (R, K, 4), detached and clipped to the images."""
        assert rois.image_sizes is not None
        boxes = self.convention.decode(output.deltas.detach() / self.coder_weights, rois.boxes[:, None])
        return self.convention.clip(boxes, rois.image_sizes[rois.images][:, None])

    def decode(self, output: BoxOutput, rois: Rois) -> Rois:
        """``rois`` with the boxes of a class-agnostic stage, detached and clipped to the images."""
        return rois.with_boxes(self.boxes(output, rois).squeeze(1))

    def losses(self, output: BoxOutput, rois: Rois, match: Match) -> dict[str, LossTerm]:
        """``cls`` and ``box``: both are means over all RoIs, as in Fast R-CNN; only positives have a ``box`` loss."""
        positive = rois.valid & (match.iou >= self.settings.positive_iou)
        labels = torch.where(positive, match.labels, 0)
        classes = output.deltas.shape[1]
        column = (labels - 1).clamp(min=0) if classes > 1 else torch.zeros_like(labels)
        deltas = output.deltas[torch.arange(len(labels), device=labels.device), column]
        targets = self.convention.encode(match.boxes, rois.boxes) * self.coder_weights
        # Other rows have no object, and the logarithm of an empty box is not finite.
        targets = torch.where(positive[:, None], targets, 0.0)
        distance = F.smooth_l1_loss(deltas, targets, beta=_SMOOTH_L1_BETA, reduction="none").sum(dim=1)
        losses = {
            "cls": classification_loss(output.logits, labels, rois.valid),
            "box": LossTerm(torch.where(positive, distance, 0.0).sum(), rois.valid.sum()),
        }
        return {name: term.weighted(self.settings.loss_weight) for name, term in losses.items()}
