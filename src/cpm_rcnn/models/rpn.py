"""Region proposal network on a feature pyramid (docs/method.md section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.models.finite import check_output
from cpm_rcnn.models.host import exporting, reads_are_free, rows_where
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.nms import grouped_nms
from cpm_rcnn.models.sampling import rank_in_group, sample_balanced
from cpm_rcnn.models.structures import GroundTruth, Rois
from cpm_rcnn.ops.conv3x3 import use_conv3x3
from cpm_rcnn.settings import Settings, architecture, choice, flag, inference, integer, list_of, number, training

RATIOS = (0.5, 1.0, 2.0)
_POSITIVE_IOU, _NEGATIVE_IOU = 0.7, 0.3
_SAMPLES, _POSITIVE_FRACTION = 256, 0.5
_SMOOTH_L1_BETA = 1 / 9
_NMS_IOU = 0.7
# Pairs of object and anchor whose IoU is computed at once: as many as the caches of a CPU hold. On an accelerator each
# chunk costs the same number of kernels, so it is as large as half a GiB of memory allows.
_CHUNK, _CHUNK_ACCELERATOR = 1 << 21, 1 << 24


@dataclass(frozen=True)
class RPNSettings(Settings):
    """Settings of the region proposal network.

    Attributes:
        anchor_sizes: one anchor size for each of P2..P6: the square root of the anchor's area in pixels.
        ignore_border_anchors: whether anchors that cross the image border are ignored in training, as in the release.
            If images are hardly larger than their objects, almost no anchors remain, and this should be False.
        proposals_train: proposals kept per level before NMS and per image after NMS, in training.
        proposals_train_per: what ``proposals_train`` limits after NMS: the proposals of an ``image``, or of the
            ``batch`` of a process, whose best are kept whatever their image.
        proposals_test: as ``proposals_train``, at test and always per image.
    """

    anchor_sizes: Sequence[float] = architecture((32, 64, 128, 256, 512), check=list_of(number(1), 5))
    ignore_border_anchors: bool = training(True, check=flag)
    proposals_train: int = training(2000, check=integer())
    proposals_train_per: str = training("image", check=choice("image", "batch"))
    proposals_test: int = inference(1000, check=integer())


class RegionProposalNetwork(nn.Module):
    """Predicts objectness and box deltas on anchors, and selects proposals.

    Args:
        settings: anchor sizes and numbers of proposals.
        in_channels: number of channels of each pyramid level.
        strides: strides of the levels P2..P6 in pixels.
        convention: the box coordinate convention.
    """

    def __init__(
        self, settings: RPNSettings, in_channels: int, strides: Sequence[int], convention: BoxConvention
    ) -> None:
        super().__init__()
        self.settings = settings
        self.head = RPNHead(in_channels, len(RATIOS))
        use_conv3x3(self.head)
        self.strides = tuple(strides)
        self.convention = convention

    def forward(
        self, features: Sequence[Tensor], image_sizes: Tensor, ground_truth: GroundTruth | None = None
    ) -> tuple[Rois, dict[str, LossTerm]]:
        """Proposals of a batch and, if ``ground_truth`` is given, the losses.

        Args:
            features: P2..P6, each (B, C, H, W).
            image_sizes: (B, 2) height and width in pixels, without padding.
            ground_truth: ground truth of the batch; required for the losses.

        Returns:
            The proposals, detached, and a dict with ``loss_rpn_objectness`` and ``loss_rpn_box``. The dict is empty
            without ``ground_truth``.
        """
        logits_per_level, deltas_per_level = self.head(list(features))
        # (B, A, H, W) -> (B, H * W * A), the order of the anchors.
        logits = [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits_per_level]
        deltas = [x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)).float() for x in deltas_per_level]
        padded = [side * self.strides[0] for side in features[0].shape[-2:]]
        anchors = [
            level_anchors(self.convention, stride, size, feature.shape[-2:], feature.device, padded)
            for stride, size, feature in zip(self.strides, self.settings.anchor_sizes, features)
        ]
        if ground_truth is None:
            check_output("rpn", self, *logits, *deltas)
        with torch.no_grad():
            proposals = self._propose(logits, deltas, anchors, image_sizes)
        if ground_truth is None:
            return proposals, {}
        return proposals, self._losses(
            torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), image_sizes, ground_truth
        )

    def _propose(self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], image_sizes: Tensor) -> Rois:
        limit = self.settings.proposals_train if self.training else self.settings.proposals_test
        batch = image_sizes.shape[0]
        scores, levels, picked, picked_anchors = [], [], [], []
        for level, (level_logits, level_deltas, anchor) in enumerate(zip(logits, deltas, anchors)):
            best, rows = self._best(level_logits, limit)
            scores.append(best)
            levels.append(torch.full_like(rows, level))
            picked.append(level_deltas.gather(1, rows[..., None].expand(-1, -1, 4)))
            picked_anchors.append(anchor[rows])
        decoded = self.convention.decode(torch.cat(picked, 1), torch.cat(picked_anchors, 1))
        box = self.convention.clip(decoded, image_sizes[:, None]).flatten(0, 1)
        score, level_of = torch.cat(scores, 1).flatten(), torch.cat(levels, 1).flatten()
        image = torch.arange(batch, device=score.device)[:, None].expand(batch, score.shape[0] // batch).flatten()
        width, height = self.convention.sizes(box)
        nonempty = (width > 0) & (height > 0)
        rows = rows_where(nonempty, box.shape[0])
        group = image * len(anchors) + level_of
        order, kept = grouped_nms(box[rows], score[rows], group[rows], _NMS_IOU, nonempty[rows])
        box, score, image = (each[rows[order]] for each in (box, score, image))
        together = self.training and self.settings.proposals_train_per == "batch"
        # Rows that were not kept come last.
        key = torch.where(kept, -score, torch.inf)
        rank, _ = rank_in_group(key, torch.zeros_like(image) if together else image, batch)
        at_most = None if exporting() else (min(limit, sum(len(anchor) for anchor in anchors)),) * batch
        (proposals,) = Rois(box, image, kept & (rank < limit), image_sizes, at_most).compact()
        return proposals[:limit] if together else proposals

    def _best(self, logits: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """The highest scores (B, K) of a level in descending order, and their anchors (B, K); logits (B, A)."""
        last = logits.shape[1] - 1
        if exporting():
            # The number of scores is then never a symbol. Padding repeats the last anchor, and NMS drops it.
            logits = F.pad(logits, (0, limit), value=-torch.inf)
        if self.convention.ranks_probabilities:
            # mmdetection sorts all scores. Among equal ones, this gives the same order more often than topk.
            scores, rows = logits.sigmoid().sort(dim=1, descending=True)
            scores, rows = scores[:, :limit], rows[:, :limit]
        else:
            scores, rows = logits.topk(limit if exporting() else min(limit, logits.shape[1]), dim=1)
        return scores, rows.clamp(max=last) if exporting() else rows

    def _losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, image_sizes: Tensor, ground_truth: GroundTruth
    ) -> dict[str, LossTerm]:
        labels, boxes = self._assign(anchors, image_sizes, ground_truth)
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
        # Masked instead of gathered, so that the number of samples stays on the device.
        encoded = self.convention.encode(torch.where(positive[..., None], boxes, anchors), anchors)
        distance = F.smooth_l1_loss(deltas, encoded, beta=_SMOOTH_L1_BETA, reduction="none").sum(-1)
        return {
            "loss_rpn_objectness": LossTerm(torch.where(chosen, objectness, 0.0).sum(), count),
            "loss_rpn_box": LossTerm(torch.where(positive, distance, 0.0).sum(), count),
        }

    @torch.no_grad()
    def _assign(self, anchors: Tensor, image_sizes: Tensor, ground_truth: GroundTruth) -> tuple[Tensor, Tensor]:
        """Labels (B, A), 1 for object, 0 for background, -1 for ignored, and the matched boxes (B, A, 4)."""
        best, index, is_best = self._match(anchors, ground_truth)
        positive = (best >= _POSITIVE_IOU) | is_best
        labels = torch.where(positive, 1, torch.where(best < _NEGATIVE_IOU, 0, -1))
        if self.settings.ignore_border_anchors:
            clipped = self.convention.clip(anchors, image_sizes[:, None].to(anchors.dtype))
            labels = labels.masked_fill((clipped != anchors).any(dim=-1), -1)
        return labels, ground_truth.boxes.gather(1, index[..., None].expand(-1, -1, 4))

    def _match(self, anchors: Tensor, ground_truth: GroundTruth) -> tuple[Tensor, Tensor, Tensor]:
        """Match every anchor with the object that it overlaps most.

        Objects are compared with all anchors one image and one chunk at a time, so that neither the memory nor the time
        of a batch depends on the number of objects in its most crowded image.

        Returns:
            The best IoU of each anchor (B, A), -1 where the image has no object; the index of that object (B, A); and
            whether the anchor is one of the best-overlapping anchors of any object (B, A).
        """
        shape = len(ground_truth.counts), len(anchors)
        best = anchors.new_full(shape, -1.0)
        index = torch.zeros(shape, dtype=torch.int64, device=anchors.device)
        is_best = torch.zeros(shape, dtype=torch.bool, device=anchors.device)
        step = max(1, (_CHUNK if reads_are_free(anchors) else _CHUNK_ACCELERATOR) // len(anchors))
        for image, count in enumerate(ground_truth.counts):
            for start in range(0, count, step):
                objects = ground_truth.boxes[image, start : min(start + step, count)]
                iou = self.convention.iou(objects[:, None], anchors)
                chunk_best, chunk_index = iou.max(dim=0)
                # Of objects with the same IoU the first is matched, as a maximum over all objects would do.
                better = chunk_best > best[image]
                best[image] = torch.where(better, chunk_best, best[image])
                index[image] = torch.where(better, chunk_index + start, index[image])
                # Each object's best-overlapping anchors are positive, whatever their IoU, as long as they overlap at
                # all. A chunk has all anchors, so the best of its objects are final; no IoU is 2.
                best_of_object = iou.amax(dim=1, keepdim=True)
                is_best[image] |= (iou == torch.where(best_of_object > 0, best_of_object, 2.0)).any(dim=0)
        return best, index, is_best


def level_anchors(
    convention: BoxConvention,
    stride: int,
    size: float,
    shape: Sequence[int],
    device: torch.device,
    padded: Sequence[int] | None = None,
) -> Tensor:
    """The anchors of one level, ordered by row, column and ratio.

    Args:
        convention: the box coordinate convention.
        stride: distance between two cells in pixels.
        size: square root of the anchors' area in pixels.
        shape: height and width of the level in cells.
        device: device of the result.
        padded: height and width of the padded image in pixels; None if it is ``shape`` times ``stride``.

    Returns:
        (H * W * 3, 4) float32, xyxy pixels.
    """
    cell = convention.cell_anchors(stride, size, RATIOS).to(device, non_blocking=True)
    padded = [side * stride for side in shape] if padded is None else padded
    step_y, step_x = convention.anchor_steps(stride, shape, padded)
    y = torch.arange(shape[0], dtype=torch.float32, device=device) * step_y
    x = torch.arange(shape[1], dtype=torch.float32, device=device) * step_x
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1)
    return (shifts[:, :, None] + cell).flatten(0, 2)
