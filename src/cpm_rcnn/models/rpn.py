"""Region proposal network on a feature pyramid (spec section 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import Rois, GroundTruth, grouped_nms
from cpm_rcnn.models.sampling import rank_in_group, sample_balanced
from cpm_rcnn.boxes import BoxConvention

RATIOS = (0.5, 1.0, 2.0)
_POSITIVE_IOU, _NEGATIVE_IOU = 0.7, 0.3
_SAMPLES, _POSITIVE_FRACTION = 256, 0.5
_SMOOTH_L1_BETA = 1 / 9
_NMS_IOU = 0.7


class RegionProposalNetwork(nn.Module):
    """Anchors, objectness and deltas; proposals out.

    Args:
        in_channels: channels of the pyramid.
        strides: strides of its levels, in pixels.
        anchor_sizes: one anchor size a level: square root of its area in pixels.
        ignore_border_anchors: whether anchors that cross the image border teach nothing (the release's rule). Where
            images are hardly larger than their objects that leaves hardly an anchor; small-image recipes turn it off.
        proposals_train: proposals kept per level before NMS and per image after it, in training.
        proposals_test: the same at test.
        convention: the pixel convention.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        *,
        anchor_sizes: Sequence[float],
        ignore_border_anchors: bool,
        proposals_train: int,
        proposals_test: int,
        convention: BoxConvention,
    ) -> None:
        super().__init__()
        self.head = RPNHead(in_channels, len(RATIOS))
        self.strides = tuple(strides)
        self.anchor_sizes = tuple(anchor_sizes)
        self.ignore_border_anchors = ignore_border_anchors
        self.proposals_train = proposals_train
        self.proposals_test = proposals_test
        self.convention = convention

    def forward(
        self, features: Sequence[Tensor], image_sizes: Tensor, truth: GroundTruth | None = None
    ) -> tuple[Rois, dict[str, LossTerm]]:
        """Proposals of a batch and, with ``truth``, the losses.

        Args:
            features: one (B, C, H, W) a level.
            image_sizes: (B, 2) height and width in pixels, without padding.
            truth: ground truth; given in training.

        Returns:
            Proposals without gradient, and ``loss_rpn_objectness`` and ``loss_rpn_box`` (empty without ``truth``).
        """
        logits_per_level, deltas_per_level = self.head(list(features))
        # (B, A, H, W) -> (B, H * W * A), the order of the anchors.
        logits = [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits_per_level]
        deltas = [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4).float() for x in deltas_per_level]
        anchors = [
            level_anchors(self.convention, stride, size, feature.shape[-2:], feature.device)
            for stride, size, feature in zip(self.strides, self.anchor_sizes, features)
        ]
        with torch.no_grad():
            proposals = self._propose(logits, deltas, anchors, image_sizes)
        if truth is None:
            return proposals, {}
        return proposals, self._losses(
            torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), image_sizes, truth
        )

    def _propose(self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], image_sizes: Tensor) -> Rois:
        limit = self.proposals_train if self.training else self.proposals_test
        batch = len(image_sizes)
        boxes, scores, levels = [], [], []
        for level, (level_logits, level_deltas, anchor) in enumerate(zip(logits, deltas, anchors)):
            best, rows = level_logits.topk(min(limit, level_logits.shape[1]), dim=1)
            picked = level_deltas.gather(1, rows[..., None].expand(-1, -1, 4))
            boxes.append(self.convention.decode(picked, anchor[rows]))
            scores.append(best)
            levels.append(torch.full_like(rows, level))
        box = self.convention.clip(torch.cat(boxes, 1), image_sizes[:, None]).flatten(0, 1)
        score, level_of = torch.cat(scores, 1).flatten(), torch.cat(levels, 1).flatten()
        image = torch.arange(batch, device=score.device).repeat_interleave(len(score) // batch)
        width, height = self.convention.sizes(box)
        keep = ((width > 0) & (height > 0)).nonzero().squeeze(1)
        box, score, group = box[keep], score[keep], image[keep] * len(anchors) + level_of[keep]
        kept = grouped_nms(box, score, group, _NMS_IOU)
        box, image = box[kept], image[keep][kept]
        rank, _ = rank_in_group(-score[kept], image, batch)
        return Rois(box, image).keep((rank < limit).nonzero().squeeze(1))

    def _losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, image_sizes: Tensor, truth: GroundTruth
    ) -> dict[str, LossTerm]:
        labels, boxes = self._assign(anchors, image_sizes, truth)
        batch, per_image = labels.shape
        images = torch.arange(batch, device=labels.device).repeat_interleave(per_image)
        flat = labels.flatten()
        sample = sample_balanced(
            flat == 1, flat == 0, images, batch, count=_SAMPLES, positive_fraction=_POSITIVE_FRACTION
        )
        positive = sample.positive.view_as(labels)
        chosen = positive | sample.negative.view_as(labels)
        count = chosen.sum()
        objectness = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
        # Masked, not gathered: how many are chosen stays on the device.
        encoded = self.convention.encode(torch.where(positive[..., None], boxes, anchors), anchors)
        distance = F.smooth_l1_loss(deltas, encoded, beta=_SMOOTH_L1_BETA, reduction="none").sum(-1)
        return {
            "loss_rpn_objectness": LossTerm(torch.where(chosen, objectness, 0.0).sum(), count),
            "loss_rpn_box": LossTerm(torch.where(positive, distance, 0.0).sum(), count),
        }

    @torch.no_grad()
    def _assign(self, anchors: Tensor, image_sizes: Tensor, truth: GroundTruth) -> tuple[Tensor, Tensor]:
        """Labels (B, A): 1 object, 0 background, -1 neither; and the matched boxes (B, A, 4)."""
        iou = self.convention.iou(truth.boxes[:, :, None], anchors)  # (B, G, A)
        iou.masked_fill_(~truth.valid[:, :, None], -1.0)
        best, index = iou.max(dim=1)
        # An object's best anchors teach it however little they overlap; but no overlap is no match.
        best_of_object = iou.amax(dim=2, keepdim=True)
        is_best = ((iou == best_of_object) & (iou > 0)).any(dim=1)
        positive = (best >= _POSITIVE_IOU) | is_best
        labels = torch.where(positive, 1, torch.where(best < _NEGATIVE_IOU, 0, -1))
        if self.ignore_border_anchors:
            clipped = self.convention.clip(anchors, image_sizes[:, None].to(anchors.dtype))
            labels = labels.masked_fill((clipped != anchors).any(dim=-1), -1)
        return labels, truth.boxes.gather(1, index[..., None].expand(-1, -1, 4))


def level_anchors(
    convention: BoxConvention, stride: int, size: float, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Anchors of one level, (H * W * ratios, 4) xyxy pixels: row by row, cell by cell, ratio by ratio.

    Args:
        convention: the pixel convention.
        stride: pixels between cells.
        size: square root of the anchors' area in pixels.
        shape: height and width of the level in cells.
        device: where the anchors are made.
    """
    cell = convention.cell_anchors(stride, size, RATIOS).to(device, non_blocking=True)
    y = torch.arange(shape[0], dtype=torch.float32, device=device) * stride
    x = torch.arange(shape[1], dtype=torch.float32, device=device) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1)
    return (shifts[:, :, None] + cell).flatten(0, 2)
