"""RoIAlign over the levels of a feature pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from cpm_rcnn.models.rois import Rois
from cpm_rcnn.pixels import PixelConvention


def pyramid_levels(boxes: Tensor, num_levels: int, pixels: PixelConvention) -> Tensor:
    """Which level each box is pooled from: floor(4 + log2(sqrt(area) / 224 + 1e-6)), spec section 4.

    Args:
        boxes: (R, 4) xyxy pixels.
        num_levels: levels there are, from P2 on.
        pixels: whose area.

    Returns:
        (R,) int64, 0 = P2.
    """
    side = pixels.area(boxes).clamp(min=0).sqrt()
    level = torch.floor(4 + torch.log2(side / 224 + 1e-6))
    return level.clamp(2, 1 + num_levels).long() - 2


class PyramidRoIAlign(nn.Module):
    """Pool each RoI from the pyramid level of its size, two samples a bin side.

    Args:
        output_size: bins a side.
        strides: the stride of each level, from P2 on, in pixels.
        pixels: decides the level and the half-pixel shift.
    """

    def __init__(self, output_size: int, strides: Sequence[int], pixels: PixelConvention) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = tuple(strides)
        self.pixels = pixels

    def forward(self, features: Sequence[Tensor], rois: Rois) -> Tensor:
        """Pooled features (R, C, output_size, output_size) in the features' dtype.

        Args:
            features: the levels from P2 on, each (B, C, H, W); more than ``strides`` are ignored.
            rois: R boxes in pixels at network size.
        """
        features = features[: len(self.strides)]
        boxes = torch.cat([rois.images.to(rois.boxes.dtype)[:, None], rois.boxes], dim=1)
        levels = pyramid_levels(rois.boxes, len(features), self.pixels)
        size = self.output_size
        pooled = features[0].new_zeros(len(boxes), features[0].shape[1], size, size)
        for level, (feature, stride) in enumerate(zip(features, self.strides)):
            rows = (levels == level).nonzero().squeeze(1)
            # Coordinates do not survive half precision, so pooling runs in float32 whatever the features are.
            part = roi_align(
                feature.float(), boxes[rows], size, 1 / stride, sampling_ratio=2, aligned=self.pixels.aligned
            )
            pooled = pooled.index_copy(0, rows, part.to(pooled.dtype))
        return pooled
