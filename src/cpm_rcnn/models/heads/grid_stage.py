"""One grid stage: RoIs in, heatmaps and better boxes out (paper section 3.1, spec section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cpm_rcnn.errors import check_range
from cpm_rcnn.models.heatmaps import NUM_POINTS, decode_heatmaps, grid_loss, grid_targets
from cpm_rcnn.models.init import init_conv, init_deconv
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.pooling import PyramidRoIAlign
from cpm_rcnn.models.structures import Rois
from cpm_rcnn.boxes import BoxConvention

_POOLED_SIZE = 14
FEATURE_SIZE = 7
_NORM_GROUPS = 36
# Sigmoid of the first prediction is 0.01: most cells are negative.
_PRIOR_LOGIT = -4.59511985013459


@dataclass(frozen=True)
class StageSettings:
    """What tells the stages of the cascade apart.

    Attributes:
        positive_iou: RoIs train this stage from this IoU with their object on, 0..1.
        mapping_ratio: how far the heatmap reaches beyond the RoI, as a share of its size.
        loss_weight: of this stage's grid loss.
    """

    positive_iou: float
    mapping_ratio: float
    loss_weight: float

    def __post_init__(self) -> None:
        check_range("cmm.stages.positive_iou", self.positive_iou, 0, 1)
        check_range("cmm.stages.mapping_ratio", self.mapping_ratio, 0)
        check_range("cmm.stages.loss_weight", self.loss_weight, 0)


class GridOutput(NamedTuple):
    """What a grid stage says of R RoIs.

    Attributes:
        point_features: (R, 9 * channels, 7, 7), before the deconvolutions; ISM reads them.
        heatmaps: (R, 9, 28, 28) logits to decode; from the fused features where there is fusion.
        unfused_heatmaps: (R, 9, 28, 28) logits of the unfused features; only with fusion in training.
    """

    point_features: Tensor
    heatmaps: Tensor
    unfused_heatmaps: Tensor | None = None


class PointFusion(nn.Module):
    """Grid R-CNN's feature fusion: each point sums messages from its neighbours on the 3x3 grid, twice.

    Every directed edge of the grid (24) has its own depthwise 5x5 and 1x1 convolution; all edges run as one grouped
    convolution. Edges are ordered by receiving point, then by sending point.

    Args:
        channels: of one point.
    """

    sources: Tensor
    sinks: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        edges = [
            (sink, source)
            for sink in range(NUM_POINTS)
            for source in range(NUM_POINTS)
            if abs(sink // 3 - source // 3) + abs(sink % 3 - source % 3) == 1
        ]
        self.register_buffer("sinks", torch.tensor([sink for sink, _ in edges]), persistent=False)
        self.register_buffer("sources", torch.tensor([source for _, source in edges]), persistent=False)
        self.first_order = self._messages(channels, len(edges))
        self.second_order = self._messages(channels, len(edges))

    @staticmethod
    def _messages(channels: int, edges: int) -> nn.Sequential:
        width = channels * edges
        return nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width), nn.Conv2d(width, width, 1, groups=edges)
        )

    def forward(self, point_features: Tensor) -> Tensor:
        """Fused features of the shape of ``point_features`` (R, 9 * channels, 7, 7)."""
        points = point_features.unflatten(1, (NUM_POINTS, -1))
        first = self._pass(self.first_order, points, points)
        return self._pass(self.second_order, points, first).flatten(1, 2)

    def _pass(self, messages: nn.Sequential, points: Tensor, senders: Tensor) -> Tensor:
        sent = messages(senders[:, self.sources].flatten(1, 2)).unflatten(1, (len(self.sources), -1))
        return points.index_add(1, self.sinks, sent.to(points.dtype))


class GridStage(nn.Module):
    """Grid head and its mapping.

    RoIAlign 14x14; 3x3 convolutions with GroupNorm and ReLU, the first with stride 2; per point two transposed
    convolutions up to 28x28. The channels of point i are contiguous.

    Args:
        settings: mapping ratio, threshold and weight.
        in_channels: channels of the pyramid.
        strides: strides of the levels pooled from, in pixels.
        point_channels: channels of one point; a multiple of 4 (GroupNorm has 36 groups over 9 points).
        num_convs: convolutions before the deconvolutions.
        fusion: whether points exchange features (Grid R-CNN's; off in CPM R-CNN).
        convention: the pixel convention.
    """

    def __init__(
        self,
        settings: StageSettings,
        in_channels: int,
        strides: Sequence[int],
        *,
        point_channels: int,
        num_convs: int,
        fusion: bool,
        convention: BoxConvention,
    ) -> None:
        super().__init__()
        width = NUM_POINTS * point_channels
        self.settings = settings
        self.pool = PyramidRoIAlign(_POOLED_SIZE, strides, convention)
        layers: list[nn.Module] = []
        for i in range(num_convs):
            conv = nn.Conv2d(width if i else in_channels, width, 3, stride=1 if i else 2, padding=1)
            init_conv(conv)
            layers += [conv, nn.GroupNorm(_NORM_GROUPS, width), nn.ReLU(inplace=True)]
        self.convs = nn.Sequential(*layers)
        self.fusion = PointFusion(point_channels) if fusion else None
        first = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, groups=NUM_POINTS)
        last = nn.ConvTranspose2d(width, NUM_POINTS, 4, stride=2, padding=1, groups=NUM_POINTS)
        init_deconv(first, bias=0.0)
        init_deconv(last, bias=_PRIOR_LOGIT)
        self.deconvs = nn.Sequential(first, nn.GroupNorm(NUM_POINTS, width), nn.ReLU(inplace=True), last)

    def forward(self, features: Sequence[Tensor], rois: Rois) -> GridOutput:
        """Heatmaps of R ``rois`` on the pyramid ``features``."""
        point_features = self.convs(self.pool(features, rois))
        if self.fusion is None:
            return GridOutput(point_features, self.deconvs(point_features))
        heatmaps = self.deconvs(self.fusion(point_features))
        return GridOutput(point_features, heatmaps, self.deconvs(point_features) if self.training else None)

    def decode(self, output: GridOutput, rois: Rois) -> Rois:
        """The boxes that the heatmaps point at, without gradient."""
        boxes = decode_heatmaps(output.heatmaps.detach(), rois.boxes, self.settings.mapping_ratio)
        return Rois(boxes, rois.images)

    def loss(self, output: GridOutput, rois: Rois, boxes: Tensor) -> LossTerm:
        """The weighted grid loss of R ``rois`` whose objects are ``boxes`` (R, 4); with fusion, both heatmaps'."""
        targets = grid_targets(rois.boxes, boxes, self.settings.mapping_ratio)
        term = grid_loss(output.heatmaps, targets)
        if output.unfused_heatmaps is not None:
            term = LossTerm(term.total + grid_loss(output.unfused_heatmaps, targets).total, term.count)
        return term.weighted(self.settings.loss_weight)
