"""The CPM head: classify, map (CMM), score (ISM), re-score (RSM). Paper section 3, docs/method.md sections 4 to 7."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.finite import check_output
from cpm_rcnn.models.heads.base import RoIHead, Role
from cpm_rcnn.models.heads.classification import Classifier, classification_loss, select_detections
from cpm_rcnn.models.heads.grid_stage import FEATURE_SIZE, INITIALIZATIONS, GridStage, StageSettings
from cpm_rcnn.models.heads.inputs import HeadInputs
from cpm_rcnn.models.heads.refinement import refine, train_cascade
from cpm_rcnn.models.heads.roi_sampling import limit_crowded, sample_rois
from cpm_rcnn.models.heads.scoring import InstanceScoring, Rescoring, calibrated_detections
from cpm_rcnn.models.heatmaps import NUM_POINTS
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.nms import grouped_nms
from cpm_rcnn.models.structures import Detections, GroundTruth, Match, Rois
from cpm_rcnn.settings import (
    Settings,
    architecture,
    choice,
    flag,
    inference,
    integer,
    number,
    optional,
    settings_list,
    training,
)

# The cascades of the paper (docs/method.md section 5): CMM's three stages, and two stages that differ only in
# their loss weight, which the paper uses to isolate ISM or RSM.
CMM_STAGES = (StageSettings(0.5, 1.0, 1.0), StageSettings(0.6, 0.5, 0.5), StageSettings(0.7, 0.25, 0.25))
TWO_STAGES = (StageSettings(0.5, 1.0, 1.0), StageSettings(0.5, 1.0, 0.5))


def _is_stages(argument: str, value: Any) -> None:
    if not settings_list(StageSettings, value, argument):
        raise ArgumentError(argument, "=[]: at least one grid stage is needed")


def _is_point_channels(argument: str, value: Any) -> None:
    integer(4)(argument, value)
    if value % 4:
        raise ArgumentError(argument, f"={value}: must be a multiple of 4")


@dataclass(frozen=True)
class CPMSettings(Settings):
    """Settings of :class:`CPMHead`; the defaults are the paper's.

    Attributes:
        stages: the grid stages; one stage is the Grid R-CNN baseline, several are CMM.
        ism: whether instance scoring (ISM) is used.
        rsm: whether re-scoring (RSM) is used.
        fusion: whether grid points exchange features (Grid R-CNN's feature fusion).
        mlp_channels: width of the FC layers of both classification branches.
        point_channels: channels per grid point, a multiple of 4.
        grid_convs: number of 3x3 convolutions in a grid stage.
        grid_init: how the convolutions and transposed convolutions of the grid stages are initialized: ``grid_rcnn``
            (kaiming-normal, N(0, 0.001), and a bias for first scores of 0.01) or ``pytorch`` (PyTorch's defaults).
        ism_weights: weights of the RoIs in the loss of ISM: ``equal``, or ``release`` for an approximation of the
            release's (:func:`~cpm_rcnn.models.heads.scoring.release_weights`).
        samples: RoIs per image that train a classification branch.
        max_grid_rois: positives per image that enter the first grid stage in training. Later stages get no more than
            that from an image with more objects than that, and from other images all decoded and ground-truth boxes.
        score_threshold: only pairs of RoI and class with a higher score enter the grid stages at test.
        nms_iou: IoU threshold of the NMS before the grid stages.
        max_detections: maximum number of boxes per image that enter the grid stages; None, as published, has no limit.
        final_nms_iou: IoU threshold of a second NMS per class, after the grid stages and with the final scores, which
            drops boxes that were refined to the same object; None, as published, keeps them.
        test_stages: number of grid stages that run at test; None runs all. ISM reads the last stage, so it is skipped
            when fewer stages run.
    """

    stages: Sequence[StageSettings] = architecture(CMM_STAGES, check=_is_stages)
    ism: bool = architecture(True, check=flag)
    rsm: bool = architecture(True, check=flag)
    fusion: bool = architecture(False, check=flag)
    mlp_channels: int = architecture(1024, check=integer())
    point_channels: int = architecture(64, check=_is_point_channels)
    grid_convs: int = architecture(8, check=integer())
    grid_init: str = training("grid_rcnn", check=choice(*INITIALIZATIONS))
    ism_weights: str = training("equal", check=choice("equal", "release"))
    samples: int = training(512, check=integer())
    max_grid_rois: int = training(96, check=integer())
    score_threshold: float = inference(0.03, check=number(0, 1))
    nms_iou: float = inference(0.3, check=number(0, 1))
    max_detections: int | None = inference(None, check=optional(integer()))
    final_nms_iou: float | None = inference(None, check=optional(number(0, 1)))
    test_stages: int | None = inference(None, check=optional(integer()))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stages", settings_list(StageSettings, self.stages, "stages"))
        if self.test_stages is not None and self.test_stages > len(self.stages):
            raise ArgumentError("test_stages", f"={self.test_stages}: the model has {len(self.stages)} grid stages")


class CPMHead(RoIHead):
    """The second stage of CPM R-CNN: boxes come from grid points instead of box regression.

    Args:
        settings: which parts the head has, their sizes, and how it is trained and tested.
        inputs: channels and strides of the pyramid, number of classes, and box convention.
    """

    settings_class = CPMSettings
    optional_parts = ("ism", "rsm")
    settings: CPMSettings
    stages: nn.ModuleList

    def __init__(self, settings: CPMSettings, inputs: HeadInputs) -> None:
        super().__init__()
        self.settings = settings
        self.convention = inputs.convention
        self.classifier = Classifier(inputs, settings.mlp_channels)
        self.stages = nn.ModuleList(
            GridStage(
                stage,
                inputs,
                point_channels=settings.point_channels,
                num_convs=settings.grid_convs,
                fusion=settings.fusion,
                init=settings.grid_init,
            )
            for stage in settings.stages
        )
        stage_features = NUM_POINTS * settings.point_channels * FEATURE_SIZE**2
        self.ism = InstanceScoring(stage_features, settings.ism_weights) if settings.ism else None
        self.rsm = Rescoring(inputs, settings.mlp_channels, settings.samples) if settings.rsm else None

    def detect(self, features: Sequence[Tensor], proposals: Rois) -> Detections:
        """Detections from ``proposals``; boxes are not clipped to the image."""
        logits = self.classifier(features, proposals).float()
        check_output("head.classifier", self.classifier, logits)
        rois, class_scores, labels, _ = select_detections(
            torch.softmax(logits, dim=1),
            proposals,
            score_threshold=self.settings.score_threshold,
            nms_iou=self.settings.nms_iou,
            max_detections=self.settings.max_detections,
        )
        rois, outputs = refine(self.grid_stages[: self.settings.test_stages], features, rois)
        complete = len(outputs) == len(self.stages)  # ISM reads the last stage
        detections = calibrated_detections(
            rois, class_scores, labels, features, outputs[-1].features, ism=self.ism if complete else None, rsm=self.rsm
        )
        if self.settings.final_nms_iou is None:
            return replace(detections, counts=rois.at_most)
        group = rois.images * logits.shape[1] + labels
        scores, valid = detections.scores, detections.valid
        rows, kept = grouped_nms(rois.boxes, scores, group, self.settings.final_nms_iou, valid)
        return replace(detections[rows], valid=kept)

    def losses(self, features: Sequence[Tensor], proposals: Rois, ground_truth: GroundTruth) -> dict[str, LossTerm]:
        """The losses of all parts: ``loss_cls``, ``loss_grid0``, ..., ``loss_ism``, ``loss_rsm``."""
        candidates = proposals.cat(ground_truth.rois())
        sampled = sample_rois(candidates, ground_truth, self.convention, self.settings.samples)
        logits = self.classifier(features, sampled.rois)
        losses = {"loss_cls": classification_loss(logits, sampled.labels, sampled.rois.valid)}

        def select(stage: GridStage, rois: Rois, match: Match) -> tuple[Rois, Match]:
            """RoIs that overlap an object by the stage's threshold, and not too many in crowded images."""
            positive = rois.where(match.iou >= stage.settings.positive_iou)
            return limit_crowded(positive, match, ground_truth, self.settings.max_grid_rois).compact(match)

        rois, match = sampled.positives(self.settings.max_grid_rois)
        cascade = train_cascade(self.grid_stages, features, rois, match, ground_truth, self.convention, select)
        losses |= {f"loss_{name}": term for name, term in cascade.losses.items()}
        if self.ism is not None:
            losses["loss_ism"] = self.ism.loss(cascade.output.features, cascade.rois, cascade.match)
        if self.rsm is not None:
            losses["loss_rsm"] = self.rsm.loss(features, sampled.negatives().cat(cascade.rois), ground_truth)
        return losses

    def roles(self) -> dict[str, Role]:
        """The classification branch, the grid stages, ISM and RSM, see :meth:`RoIHead.roles`."""
        roles = {"classifier": Role("classifier")}
        for k, stage in enumerate(self.grid_stages):
            # The feature fusion is a part of its own, so that stages with and without it can exchange the others.
            for name in ("convs", "deconvs", *(["fusion"] if stage.fusion is not None else [])):
                roles[f"stages.{k}.{name}"] = Role(f"grid {name}", k, stage.settings.mapping_ratio)
        if self.ism is not None:
            roles["ism"] = Role("ISM of grid stages")
        if self.rsm is not None:
            roles["rsm"] = Role("RSM")
        return roles

    @property
    def grid_stages(self) -> list[GridStage]:
        """``stages`` as a list, which has a type for its items."""
        return list(self.stages)  # type: ignore[arg-type]
