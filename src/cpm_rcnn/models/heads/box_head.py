"""The part that heads with box stages share: Faster R-CNN (one stage) and Cascade R-CNN (several)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cpm_rcnn.models.finite import check_output
from cpm_rcnn.models.heads.base import RoIHead, Role
from cpm_rcnn.models.heads.box_stage import BoxOutput, BoxStage
from cpm_rcnn.models.heads.classification import select_detections
from cpm_rcnn.models.heads.inputs import HeadInputs
from cpm_rcnn.models.heads.refinement import refine, train_cascade
from cpm_rcnn.models.heads.roi_sampling import POSITIVE_IOU, sample_matched, sample_rois
from cpm_rcnn.models.heads.scoring import InstanceScoring, Rescoring, calibrated_detections
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import Detections, GroundTruth, Match, Rois
from cpm_rcnn.settings import Settings, architecture, flag, inference, integer, number, training


@dataclass(frozen=True)
class BoxHeadSettings(Settings):
    """Settings that heads with box stages share.

    Attributes:
        ism: whether instance scoring (ISM) is used, on the pooled features of the last stage.
        rsm: whether re-scoring (RSM) is used, on the predicted boxes.
        mlp_channels: width of the FC layers.
        samples: RoIs per image that train a stage.
        score_threshold: only pairs of RoI and class with a higher score are candidates at test.
        nms_iou: IoU threshold of the NMS per class.
        max_detections: maximum number of detections per image.
    """

    ism: bool = architecture(False, check=flag)
    rsm: bool = architecture(False, check=flag)
    mlp_channels: int = architecture(1024, check=integer())
    samples: int = training(512, check=integer())
    score_threshold: float = inference(0.05, check=number(0, 1))
    nms_iou: float = inference(0.5, check=number(0, 1))
    max_detections: int = inference(100, check=integer())


class BoxHead(RoIHead):
    """Base of heads whose boxes come from box regression, optionally with ISM and RSM.

    Args:
        settings: see :class:`BoxHeadSettings`.
        inputs: channels and strides of the pyramid, number of classes, and box convention.
        stages: the stages; all but the last must be class-agnostic.
    """

    optional_parts = ("ism", "rsm")
    settings: BoxHeadSettings
    stages: nn.ModuleList

    def __init__(self, settings: BoxHeadSettings, inputs: HeadInputs, stages: Sequence[BoxStage]) -> None:
        super().__init__()
        self.settings = settings
        self.convention = inputs.convention
        self.stages = nn.ModuleList(stages)
        pooled = inputs.channels * stages[-1].classifier.pool.output_size ** 2
        self.ism = InstanceScoring(pooled) if settings.ism else None
        self.rsm = Rescoring(inputs, settings.mlp_channels, settings.samples) if settings.rsm else None

    def detect(self, features: Sequence[Tensor], proposals: Rois) -> Detections:
        """Detections from ``proposals``; boxes are clipped to the image."""
        *earlier, last = self.box_stages
        rois, outputs = refine(earlier, features, proposals)
        output = last(features, rois)
        boxes, probabilities = last.boxes(output, rois), self.probabilities([*outputs, output])
        check_output(f"head.stages.{len(earlier)}", last, boxes, probabilities)
        selected = select_detections(
            probabilities,
            rois,
            boxes,
            score_threshold=self.settings.score_threshold,
            nms_iou=self.settings.nms_iou,
            max_detections=self.settings.max_detections,
        )
        rois, scores, labels, rows = selected
        detections = calibrated_detections(
            rois, scores, labels, features, output.features[rows], ism=self.ism, rsm=self.rsm
        )
        return replace(detections, counts=rois.at_most)

    def probabilities(self, outputs: Sequence[BoxOutput]) -> Tensor:
        """Class probabilities (R, C + 1) float32 of R RoIs from the outputs of all stages; here those of the last."""
        return torch.softmax(outputs[-1].logits.float(), dim=1)

    def losses(self, features: Sequence[Tensor], proposals: Rois, ground_truth: GroundTruth) -> dict[str, LossTerm]:
        """The losses of all parts: ``loss_cls0``, ``loss_box0``, ..., ``loss_ism``, ``loss_rsm``."""

        def select(stage: BoxStage, rois: Rois, match: Match) -> tuple[Rois, Match]:
            """A new sample for each stage, with its own IoU threshold."""
            threshold = stage.settings.positive_iou
            sampled = sample_matched(rois, match, len(ground_truth.boxes), self.settings.samples, threshold)
            return sampled.rois, sampled.match

        stages = self.box_stages
        threshold = stages[0].settings.positive_iou
        candidates = proposals.cat(ground_truth.rois())
        first = sample_rois(candidates, ground_truth, self.convention, self.settings.samples, threshold)
        cascade = train_cascade(stages, features, first.rois, first.match, ground_truth, self.convention, select)
        losses = {f"loss_{name}": term for name, term in cascade.losses.items()}
        if self.ism is not None:
            # As in the CPM head, background does not train ISM.
            overlapping = cascade.rois.where(cascade.match.iou >= POSITIVE_IOU)
            losses["loss_ism"] = self.ism.loss(cascade.output.features, overlapping, cascade.match)
        if self.rsm is not None:
            losses["loss_rsm"] = self.rsm.loss(features, cascade.rois, ground_truth)
        return losses

    def roles(self) -> dict[str, Role]:
        """The classifiers and regressors of all stages, ISM and RSM, see :meth:`RoIHead.roles`."""
        roles = {}
        for k in range(len(self.stages)):
            roles[f"stages.{k}.classifier"] = Role("classifier", k)
            roles[f"stages.{k}.regressor"] = Role("box regressor", k)
        if self.ism is not None:
            roles["ism"] = Role("ISM of box stages")
        if self.rsm is not None:
            roles["rsm"] = Role("RSM")
        return roles

    @property
    def box_stages(self) -> list[BoxStage]:
        """``stages`` as a list, which has a type for its items."""
        return list(self.stages)  # type: ignore[arg-type]
