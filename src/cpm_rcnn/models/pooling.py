"""RoIAlign over the levels of a feature pyramid."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from cpm_rcnn.models.structures import Rois
from cpm_rcnn.boxes import BoxConvention

# Samples a bin side (spec section 4).
_SAMPLING_RATIO = 2


def pyramid_levels(boxes: Tensor, num_levels: int, convention: BoxConvention) -> Tensor:
    """Which level each box is pooled from: floor(4 + log2(sqrt(area) / 224 + 1e-6)), spec section 4.

    Args:
        boxes: (R, 4) xyxy pixels.
        num_levels: levels there are, from P2 on.
        convention: whose area.

    Returns:
        (R,) int64, 0 = P2.
    """
    side = convention.area(boxes).clamp(min=0).sqrt()
    level = torch.floor(4 + torch.log2(side / 224 + 1e-6))
    return level.clamp(2, 1 + num_levels).long() - 2


def pooling_format(features: Sequence[Tensor]) -> list[Tensor]:
    """The pyramid in the memory format that RoIAlign reads, converted once for the many poolings of a head."""
    wanted = torch.channels_last if features[0].device.type == "cpu" else torch.contiguous_format
    return [feature.contiguous(memory_format=wanted) for feature in features]


class PyramidRoIAlign(nn.Module):
    """Pool each RoI from the pyramid level of its size, two samples a bin side, as ``torchvision.ops.roi_align`` does.

    On a CPU, torchvision works out every sample's weights anew for each channel, in one thread backward; there the
    same sums run as one ``embedding_bag`` over all levels, whose bags are the bins (``benchmarks/roi_align.py``).

    Args:
        output_size: bins a side.
        strides: the stride of each level, from P2 on, in pixels.
        convention: decides the level and the half-pixel shift.
    """

    def __init__(self, output_size: int, strides: Sequence[int], convention: BoxConvention) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = tuple(strides)
        self.convention = convention

    def forward(self, features: Sequence[Tensor], rois: Rois) -> Tensor:
        """Pooled features (R, C, output_size, output_size) in the features' dtype.

        Args:
            features: the levels from P2 on, each (B, C, H, W), best as :func:`pooling_format` gives them; more than
                ``strides`` are ignored.
            rois: R boxes in pixels at network size.
        """
        features = features[: len(self.strides)]
        levels = pyramid_levels(rois.boxes, len(features), self.convention)
        # Coordinates do not survive half precision, so pooling runs in float32 whatever the features are.
        pool = self._pool_bags if features[0].device.type == "cpu" else self._pool_levels
        return pool([feature.float() for feature in features], rois, levels).to(features[0].dtype)

    def _pool_levels(self, features: list[Tensor], rois: Rois, levels: Tensor) -> Tensor:
        boxes = torch.cat([rois.images.to(rois.boxes.dtype)[:, None], rois.boxes], dim=1)
        # Level after level: one wait for the device, for the counts, and not one a level.
        order = levels.argsort(stable=True)
        counts = torch.bincount(levels, minlength=len(features)).tolist()
        parts = [
            roi_align(feature, part, self.output_size, 1 / stride, _SAMPLING_RATIO, self.convention.aligned)
            for feature, stride, part in zip(features, self.strides, boxes[order].split(counts))
        ]
        pooled = torch.cat(parts)
        return torch.empty_like(pooled).index_copy(0, order, pooled)

    def _pool_bags(self, features: list[Tensor], rois: Rois, levels: Tensor) -> Tensor:
        batch, channels = features[0].shape[:2]
        cells = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features])
        shapes = torch.tensor([feature.shape[-2:] for feature in features])
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
        pooled = F.embedding_bag(indices.view(-1, taps), cells, mode="sum", per_sample_weights=weights.view(-1, taps))
        size = self.output_size
        return pooled.view(-1, size, size, channels).permute(0, 3, 1, 2)

    def _taps(self, start: Tensor, end: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Cells that the bins along one axis read, and their shares of the bin's mean.

        Args:
            start: (R,) where the RoIs begin, in cells.
            end: (R,) where they end.
            size: (R,) int64, cells of the map.

        Returns:
            (R, bins, 4) int64 cells and (R, bins, 4) float32 weights: two samples a bin, two cells a sample.
        """
        if self.convention.aligned:
            start, end = start - 0.5, end - 0.5
            length = end - start
        else:
            length = (end - start).clamp(min=1)
        samples = self.output_size * _SAMPLING_RATIO
        positions = start[:, None] + length[:, None] * ((torch.arange(samples) + 0.5) / samples)
        last = (size - 1)[:, None]
        # A sample more than one cell outside the map is zero; nearer ones read the border.
        inside = (positions >= -1) & (positions <= size[:, None])
        positions = positions.clamp(min=0)
        low = torch.minimum(positions.long(), last)
        high = torch.minimum(low + 1, last)
        share = torch.where(low == last, 0.0, positions - low) / _SAMPLING_RATIO
        weights = torch.stack([1 / _SAMPLING_RATIO - share, share], dim=-1) * inside[..., None]
        cells = torch.stack([low, high], dim=-1)
        return cells.view(-1, self.output_size, 4), weights.view(-1, self.output_size, 4)
