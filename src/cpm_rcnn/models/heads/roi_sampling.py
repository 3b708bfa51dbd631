"""Selection of the RoIs that train a head: matching, sampling, and the RoIs of the next stage.

See docs/method.md sections 4 and 5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.models.host import from_host
from cpm_rcnn.models.sampling import rank_in_group, sample_balanced
from cpm_rcnn.models.structures import GroundTruth, Match, Rois, match_rois

# RoIs with at least this IoU with an object are positive; at most a quarter of the samples are.
POSITIVE_IOU = 0.5
_POSITIVE_FRACTION = 0.25


@dataclass(frozen=True)
class SampledRois:
    """R RoIs that train a classification branch.

    Attributes:
        rois: the RoIs.
        match: their best-overlapping ground truth.
        labels: (R,) int64 in 0..C; 0 is background.
        rank: (R,) int64, a random order 0, 1, ... of the positives of each image; undefined for negatives.
    """

    rois: Rois
    match: Match
    labels: Tensor
    rank: Tensor

    def positives(self, limit: int) -> tuple[Rois, Match]:
        """At most ``limit`` random positives per image, with their match."""
        return self.rois.where((self.labels > 0) & (self.rank < limit), at_most=limit).compact(self.match)

    def negatives(self) -> Rois:
        """The background RoIs."""
        (rois,) = self.rois.where(self.labels == 0).compact()
        return rois


@torch.no_grad()
def sample_rois(
    rois: Rois,
    ground_truth: GroundTruth,
    convention: BoxConvention,
    count: int,
    positive_iou: float = POSITIVE_IOU,
) -> SampledRois:
    """Match RoIs and choose up to ``count`` per image at random, at most a quarter of them positive.

    Args:
        rois: the candidates.
        ground_truth: ground truth of the batch.
        convention: the box coordinate convention.
        count: maximum number of RoIs per image.
        positive_iou: minimum IoU of positives with their object.
    """
    (rois,) = rois.compact()
    match = match_rois(rois, ground_truth, convention)
    return sample_matched(rois, match, len(ground_truth.boxes), count, positive_iou)


@torch.no_grad()
def sample_matched(rois: Rois, match: Match, num_images: int, count: int, positive_iou: float) -> SampledRois:
    """Like :func:`sample_rois`, for RoIs of ``num_images`` images whose ``match`` is known."""
    positive = match.iou >= positive_iou
    sample = sample_balanced(
        positive & rois.valid,
        ~positive & rois.valid,
        rois.images,
        num_images,
        count=count,
        positive_fraction=_POSITIVE_FRACTION,
    )
    labels = torch.where(positive, match.labels, 0)
    chosen = rois.where(sample.positive | sample.negative, at_most=(count,) * num_images)
    return SampledRois(*chosen.compact(match, labels, sample.rank))


@torch.no_grad()
def next_stage_rois(
    rois: Rois, decoded: Rois, match: Match, ground_truth: GroundTruth, convention: BoxConvention
) -> tuple[Rois, Match]:
    """The candidates of the next cascade stage: the decoded boxes and the ground-truth boxes, matched again.

    RoIs that equal their ground-truth box are dropped, because the ground-truth boxes are appended anyway.

    Args:
        rois: R RoIs of the stage.
        decoded: the boxes that the stage decoded from them.
        match: the ground truth of ``rois``.
        ground_truth: ground truth of the batch.
        convention: the box coordinate convention.

    Returns:
        The candidates and their match. The caller selects those with a sufficient IoU.
    """
    is_ground_truth = (rois.boxes == match.boxes).all(dim=1)
    (candidates,) = decoded.where(~is_ground_truth).cat(ground_truth.rois()).compact()
    return candidates, match_rois(candidates, ground_truth, convention)


@torch.no_grad()
def limit_crowded(rois: Rois, match: Match, ground_truth: GroundTruth, limit: int) -> Rois:
    """Bound the RoIs of a later cascade stage in images with more than ``limit`` objects.

    In such an image at most ``limit`` RoIs stay valid: first decoded boxes, then ground-truth boxes, at random within
    each. A stage has nothing to correct in a ground-truth box, and at test it gets only decoded boxes. Other images
    have at most ``limit`` decoded boxes and ``limit`` ground-truth boxes, and keep all of them. If no image of the
    batch has more objects, no random number is drawn.

    Args:
        rois: the positives of the stage.
        match: their ground truth.
        ground_truth: of the batch.
        limit: maximum number of RoIs per image.
    """
    if max(ground_truth.counts) <= limit:
        return rois
    batch = len(ground_truth.counts)
    limits = [limit if count > limit else len(rois) for count in ground_truth.counts]
    is_ground_truth = (rois.boxes == match.boxes).all(dim=1)
    key = torch.rand(len(rois), device=rois.images.device) + is_ground_truth
    rank, _ = rank_in_group(key, torch.where(rois.valid, rois.images, batch), batch + 1)
    return rois.where(rank < from_host(limits, rank)[rois.images], at_most=limits)
