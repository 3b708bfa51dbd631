"""RoIAlign over the levels of a feature pyramid."""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.models.host import exporting, reads_are_free
from cpm_rcnn.models.structures import Rois

# The sampling ratio that the pooling on a CPU is written for.
_BAG_SAMPLES = 2
# A coordinate in pixels that is outside of every image.
_OUTSIDE = -1e6


def pyramid_levels(boxes: Tensor, num_levels: int, convention: BoxConvention) -> Tensor:
    """The level that each box is pooled from: floor(4 + log2(sqrt(area) / 224 + 1e-6)), docs/method.md section 4.

    Args:
        boxes: (R, 4) xyxy pixels.
        num_levels: number of levels to pool from, P2 first.
        convention: the box coordinate convention, which defines the area.

    Returns:
        (R,) int64, 0 = P2.
    """
    side = convention.area(boxes).clamp(min=0).sqrt()
    level = torch.floor(4 + torch.log2(side / 224 + 1e-6))
    return level.clamp(2, 1 + num_levels).long() - 2


class CellPyramid(list[Tensor]):
    """The levels of a pyramid, which also stand one after the other in one tensor that all poolings read.

    Args:
        features: the levels, each (B, C, H, W).

    Attributes:
        cells: (sum of B * H * W, C) float32, ordered by level, image, row and column.
    """

    def __init__(self, features: Sequence[Tensor]) -> None:
        super().__init__(features)
        channels = features[0].shape[1]
        self.cells = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, channels).float() for feature in features])


def pooling_format(features: Sequence[Tensor]) -> list[Tensor]:
    """The pyramid in the format that RoIAlign reads fastest, converted once for all poolings of a head."""
    if exporting():
        return list(features)
    if reads_are_free(features[0]):
        return CellPyramid([feature.contiguous(memory_format=torch.channels_last) for feature in features])
    return [feature.contiguous() for feature in features]


class PyramidRoIAlign(nn.Module):
    """Pools each RoI from the pyramid level that fits its size, as ``torchvision.ops.roi_align`` does.

    torchvision's CPU operator recomputes every sample's weights for each channel and runs its backward pass in one
    thread. On a CPU and with sampling ratio 2, the same sums are therefore computed as one ``embedding_bag`` over all
    levels, with one bag per bin (``benchmarks/roi_align.py``).

    The operator pools from one level. On an accelerator, where the host does not know how many RoIs a level has, it is
    called for each level with all RoIs, and those of other levels are moved outside of the image, where nothing is
    sampled and no gradient is added.

    Args:
        output_size: number of bins per side.
        strides: stride of each level in pixels, from P2 on.
        convention: decides the level of a box and RoIAlign's sampling ratio and shift.
    """

    def __init__(self, output_size: int, strides: Sequence[int], convention: BoxConvention) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = tuple(strides)
        self.convention = convention

    def forward(self, features: Sequence[Tensor], rois: Rois) -> Tensor:
        """Pooled features (R, C, output_size, output_size) in the features' dtype.

        Args:
            features: the levels from P2 on, each (B, C, H, W), fastest in the format of :func:`pooling_format`; levels
                beyond ``strides`` are ignored.
            rois: R RoIs.
        """
        levels = pyramid_levels(rois.boxes, len(self.strides), self.convention)
        # Half precision cannot represent the coordinates, so pooling always runs in float32.
        if reads_are_free(levels) and self.convention.sampling_ratio == _BAG_SAMPLES and not exporting():
            pyramid = features if isinstance(features, CellPyramid) else CellPyramid(features)
            pooled = self._pool_bags(pyramid, rois, levels)
        else:
            pool = self._pool_levels if reads_are_free(levels) else self._pool_masked
            pooled = pool([feature.float() for feature in features[: len(self.strides)]], rois, levels)
        return pooled.to(features[0].dtype)

    def _pool_levels(self, features: list[Tensor], rois: Rois, levels: Tensor) -> Tensor:
        rows = _image_and_box(rois.images, rois.boxes)
        parts = (rows[(levels == level).nonzero().squeeze(1)] for level in range(len(features)))
        pooled = torch.cat([self._roi_align(*each) for each in zip(features, self.strides, parts)])
        # The parts are ordered by level; this is the place of each RoI in them.
        return pooled[levels.argsort(stable=True).argsort()]

    def _pool_masked(self, features: list[Tensor], rois: Rois, levels: Tensor) -> Tensor:
        # The number of samples of an infinite box would be infinite.
        boxes = rois.boxes.nan_to_num(0.0, 0.0, 0.0)
        parts = (
            _image_and_box(rois.images, torch.where((levels == level)[:, None], boxes, _OUTSIDE))
            for level in range(len(features))
        )
        return reduce(torch.add, (self._roi_align(*each) for each in zip(features, self.strides, parts)))

    def _roi_align(self, feature: Tensor, stride: int, rows: Tensor) -> Tensor:
        ratio, aligned = self.convention.sampling_ratio, self.convention.aligned
        return roi_align(feature, rows, self.output_size, 1 / stride, ratio, aligned)

    def _pool_bags(self, pyramid: CellPyramid, rois: Rois, levels: Tensor) -> Tensor:
        batch, channels = pyramid[0].shape[:2]
        shapes = torch.tensor([feature.shape[-2:] for feature in pyramid])
        starts = batch * shapes.prod(1).cumsum(0) - batch * shapes.prod(1)
        height, width = shapes[levels].unbind(1)
        scale = 1 / torch.tensor(self.strides, dtype=torch.float32)[levels]
        x1, y1, x2, y2 = rois.boxes.float().unbind(1)
        rows, row_weights = self._taps(y1 * scale, y2 * scale, height)
        columns, column_weights = self._taps(x1 * scale, x2 * scale, width)
        # (R, bins down, bins across, taps down, taps across)
        first = (starts[levels] + rois.images * height * width).view(-1, 1, 1, 1, 1)
        indices = first + rows[:, :, None, :, None] * width.view(-1, 1, 1, 1, 1) + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        taps = rows.shape[-1] ** 2
        pooled = F.embedding_bag(
            indices.view(-1, taps), pyramid.cells, mode="sum", per_sample_weights=weights.view(-1, taps)
        )
        size = self.output_size
        return pooled.view(-1, size, size, channels).permute(0, 3, 1, 2)

    def _taps(self, start: Tensor, end: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """The cells that the bins along one axis read, and their weights in the mean of the bin.

        Args:
            start: (R,) first coordinate of the RoIs, in cells.
            end: (R,) last coordinate, in cells.
            size: (R,) int64, number of cells of the feature map along the axis.

        Returns:
            (R, bins, 4) int64 cells and (R, bins, 4) float32 weights: two samples per bin, two cells per sample.
        """
        if self.convention.aligned:
            start, end = start - 0.5, end - 0.5
            length = end - start
        else:
            length = (end - start).clamp(min=1)
        samples = self.output_size * _BAG_SAMPLES
        positions = start[:, None] + length[:, None] * ((torch.arange(samples) + 0.5) / samples)
        last = (size - 1)[:, None]
        # Samples more than one cell outside the map are zero; those less far outside read the border cell.
        inside = (positions >= -1) & (positions <= size[:, None])
        positions = positions.clamp(min=0)
        low = torch.minimum(positions.long(), last)
        high = torch.minimum(low + 1, last)
        share = torch.where(low == last, 0.0, positions - low) / _BAG_SAMPLES
        weights = torch.stack([1 / _BAG_SAMPLES - share, share], dim=-1) * inside[..., None]
        cells = torch.stack([low, high], dim=-1)
        return cells.view(-1, self.output_size, 4), weights.view(-1, self.output_size, 4)


def _image_and_box(images: Tensor, boxes: Tensor) -> Tensor:
    """The rows (R, 5) that torchvision's operator takes, from images (R,) and boxes (R, 4)."""
    return torch.cat([images.to(boxes.dtype)[:, None], boxes], dim=1)
