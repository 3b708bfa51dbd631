"""The CPM head: classify, map (CMM), score (ISM), re-score (RSM). Paper section 3, spec sections 4 to 7."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cpm_rcnn.models.heads.classification import Classifier, classification_loss, select_detections
from cpm_rcnn.models.heads.grid_stage import FEATURE_SIZE, GridStage, StageSettings
from cpm_rcnn.models.heatmaps import NUM_POINTS
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import Match, Rois, GroundTruth, match_rois
from cpm_rcnn.models.sampling import sample_balanced
from cpm_rcnn.models.heads.scoring import InstanceScorer, instance_rescale, instance_score_loss, rescore
from cpm_rcnn.boxes import BoxConvention

_POSITIVE_IOU = 0.5
_POSITIVE_FRACTION = 0.25


class Detections(NamedTuple):
    """Detections of a batch.

    Attributes:
        rois: the boxes (D) and their images.
        scores: (D,) float32 0..1.
        labels: (D,) int64 1..C.
    """

    rois: Rois
    scores: Tensor
    labels: Tensor


class CPMHead(nn.Module):
    """The second stage of CPM R-CNN; it has no box regression.

    Args:
        in_channels: channels of the pyramid.
        strides: strides of the levels pooled from (P2..P5), in pixels.
        num_classes: foreground classes.
        stages: one :class:`StageSettings` a grid stage; one stage is the Grid R-CNN baseline, more are CMM.
        ism: whether the last stage scores its boxes.
        rsm: whether refined boxes are classified again.
        fusion: Grid R-CNN's feature fusion.
        mlp_channels: width of the classifiers' FC layers.
        point_channels: channels of one grid point.
        grid_convs: convolutions of a grid stage.
        samples: RoIs an image that train a classifier.
        max_grid_rois: positives an image that enter the first grid stage in training.
        score_threshold: pairs of RoI and class at or below it are no candidates.
        nms_iou: threshold of the NMS before the grid stages.
        test_stages: how many stages run at test, None for all; ISM reads the last one's features, so it needs all.
        convention: the pixel convention.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        *,
        stages: Sequence[StageSettings],
        ism: bool,
        rsm: bool,
        fusion: bool,
        mlp_channels: int,
        point_channels: int,
        grid_convs: int,
        samples: int,
        max_grid_rois: int,
        score_threshold: float,
        nms_iou: float,
        test_stages: int | None,
        convention: BoxConvention,
    ) -> None:
        super().__init__()
        self.test_stages = len(stages) if test_stages is None else test_stages
        self.samples = samples
        self.max_grid_rois = max_grid_rois
        self.score_threshold = score_threshold
        self.nms_iou = nms_iou
        self.convention = convention
        self.classifier = Classifier(in_channels, strides, mlp_channels, num_classes, convention)
        self.stages = nn.ModuleList(
            GridStage(
                settings,
                in_channels,
                strides,
                point_channels=point_channels,
                num_convs=grid_convs,
                fusion=fusion,
                convention=convention,
            )
            for settings in stages
        )
        self.ism = InstanceScorer(NUM_POINTS * point_channels * FEATURE_SIZE**2) if ism else None
        self.rsm = Classifier(in_channels, strides, mlp_channels, num_classes, convention) if rsm else None

    def detect(self, features: Sequence[Tensor], proposals: Rois) -> Detections:
        """Detections from ``proposals`` on the pyramid ``features``; boxes are not clipped to the image."""
        probabilities = torch.softmax(self.classifier(features, proposals).float(), dim=1)
        rois, scores, labels = select_detections(
            probabilities, proposals, score_threshold=self.score_threshold, nms_iou=self.nms_iou
        )
        for stage in self._stages()[: self.test_stages]:
            output = stage(features, rois)
            rois = stage.decode(output, rois)
        if self.ism is not None and self.test_stages == len(self.stages):
            scores = instance_rescale(scores, self.ism(output.point_features))
        if self.rsm is not None:
            scores = rescore(scores, self.rsm(features, rois), labels)
        return Detections(rois, scores, labels)

    def losses(self, features: Sequence[Tensor], proposals: Rois, truth: GroundTruth) -> dict[str, LossTerm]:
        """The losses of every part, by name: ``loss_cls``, ``loss_grid0``.., ``loss_ism``, ``loss_rsm``."""
        sampled = self._sample(proposals.join(truth.rois()), truth)
        logits = self.classifier(features, sampled.rois)
        losses = {"loss_cls": classification_loss(logits, sampled.labels)}

        rois, match = sampled.rois.keep(sampled.for_grid), sampled.match.keep(sampled.for_grid)
        for k, stage in enumerate(self._stages()):
            output = stage(features, rois)
            losses[f"loss_grid{k}"] = stage.loss(output, rois, match.boxes)
            if k + 1 < len(self.stages):
                decoded = stage.decode(output, rois)
                rois, match = self._next_rois(rois, decoded, match, truth, self._stages()[k + 1].settings.positive_iou)
        if self.ism is not None:
            losses["loss_ism"] = instance_score_loss(self.ism(output.point_features), match.iou)
        if self.rsm is not None:
            negatives = sampled.rois.keep(sampled.negative)
            resampled = self._sample(negatives.join(rois), truth)
            losses["loss_rsm"] = classification_loss(self.rsm(features, resampled.rois), resampled.labels)
        return losses

    def _stages(self) -> list[GridStage]:
        return list(self.stages)  # type: ignore[arg-type]

    @torch.no_grad()
    def _sample(self, rois: Rois, truth: GroundTruth) -> "_SampledRois":
        """Match ``rois`` at IoU 0.5 and choose those that train a classifier."""
        match = match_rois(rois, truth, self.convention)
        positive = match.iou >= _POSITIVE_IOU
        sample = sample_balanced(
            positive,
            ~positive,
            rois.images,
            len(truth.boxes),
            count=self.samples,
            positive_fraction=_POSITIVE_FRACTION,
        )
        kept = (sample.positive | sample.negative).nonzero().squeeze(1)
        positive, match = positive[kept], match.keep(kept)
        labels = torch.where(positive, match.labels, 0)
        for_grid = positive & (sample.rank[kept] < self.max_grid_rois)
        return _SampledRois(rois.keep(kept), match, labels, for_grid, ~positive)

    @torch.no_grad()
    def _next_rois(
        self, rois: Rois, decoded: Rois, match: Match, truth: GroundTruth, positive_iou: float
    ) -> tuple[Rois, Match]:
        """What enters the next stage: decoded boxes and ground truth that overlap an object by ``positive_iou``.

        RoIs that are ground-truth boxes themselves are dropped: their decoded boxes would teach nothing new.
        """
        was_truth = (rois.boxes == match.boxes).all(dim=1)
        rois = decoded.keep(~was_truth).join(truth.rois())
        match = match_rois(rois, truth, self.convention)
        good = match.iou >= positive_iou
        return rois.keep(good), match.keep(good)


class _SampledRois(NamedTuple):
    """RoIs (R) that train a classifier.

    Attributes:
        rois: their boxes.
        match: their best ground truth.
        labels: (R,) int64, 0 = background.
        for_grid: (R,) bool, the positives that enter the first grid stage.
        negative: (R,) bool, the background ones.
    """

    rois: Rois
    match: Match
    labels: Tensor
    for_grid: Tensor
    negative: Tensor
