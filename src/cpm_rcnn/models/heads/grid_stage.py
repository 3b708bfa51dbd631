"""A grid stage: predicts heatmaps of nine points for each RoI and decodes better boxes (paper section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cpm_rcnn.models.heads.inputs import HeadInputs
from cpm_rcnn.models.heads.refinement import RefinementStage
from cpm_rcnn.models.heatmaps import NUM_POINTS, decode_heatmaps, grid_loss, grid_targets
from cpm_rcnn.models.init import init_conv, init_deconv
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.pooling import PyramidRoIAlign
from cpm_rcnn.models.structures import Match, Rois
from cpm_rcnn.ops.conv3x3 import use_conv3x3
from cpm_rcnn.settings import Settings, architecture, number, training

_POOLED_SIZE = 14
FEATURE_SIZE = 7
_NORM_GROUPS = 36
# Grid R-CNN's initialization, or PyTorch's defaults, which the CPM R-CNN release uses (docs/method.md section 11).
INITIALIZATIONS = ("grid_rcnn", "pytorch")
# In Grid R-CNN's, the first predictions are sigmoid(bias) = 0.01, because most cells are negative.
_PRIOR_LOGIT = -4.59511985013459


@dataclass(frozen=True)
class StageSettings(Settings):
    """Settings of one grid stage.

    Attributes:
        positive_iou: minimum IoU with an object of the RoIs that train the stage, 0..1. The first stage does not use
            it: it is trained on the positives of the classification branch, whose minimum IoU is 0.5.
        mapping_ratio: fraction of the RoI's width and height by which the heatmap covers more than the RoI.
        loss_weight: weight of the stage's loss.
    """

    positive_iou: float = training(check=number(0, 1))
    mapping_ratio: float = architecture(check=number(0))
    loss_weight: float = training(check=number(0))


class GridOutput(NamedTuple):
    """The predictions of a grid stage for R RoIs.

    Attributes:
        features: (R, 9 * channels, 7, 7), the unfused point features before the transposed convolutions; ISM uses them.
        heatmaps: (R, 9, 28, 28) logits to decode, computed from the fused features if fusion is on.
        unfused_heatmaps: (R, 9, 28, 28) logits computed from the unfused features, which have a loss of their own;
            None unless fusion is on and the stage is in train mode.
    """

    features: Tensor
    heatmaps: Tensor
    unfused_heatmaps: Tensor | None = None


class PointFusion(nn.Module):
    """Grid R-CNN's feature fusion: in two rounds, each point adds transformed features of its neighbors on the grid.

    Each of the grid's 24 directed edges has its own depthwise 5x5 and 1x1 convolution. All edges are computed as one
    grouped convolution, ordered by receiving point and then by sending point.

    Args:
        channels: number of channels per point.
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


class GridStage(RefinementStage):
    """One grid stage: a small convolutional network and the mapping between boxes and heatmaps.

    RoIAlign 14x14; 3x3 convolutions with GroupNorm and ReLU, the first with stride 2; then, for each point, two
    transposed convolutions up to 28x28. The channels of one point are contiguous.

    Args:
        settings: mapping ratio, IoU threshold and loss weight.
        inputs: channels and strides of the pyramid, and box convention.
        point_channels: number of channels per point, a multiple of 4 (GroupNorm has 36 groups over 9 points).
        num_convs: number of convolutions before the transposed ones.
        fusion: whether points exchange features (on in Grid R-CNN, off in CPM R-CNN).
        init: how the layers are initialized, one of :data:`INITIALIZATIONS`.
    """

    settings: StageSettings

    def __init__(
        self,
        settings: StageSettings,
        inputs: HeadInputs,
        *,
        point_channels: int,
        num_convs: int,
        fusion: bool,
        init: str = "grid_rcnn",
    ) -> None:
        super().__init__()
        width = NUM_POINTS * point_channels
        self.settings = settings
        self.pool = PyramidRoIAlign(_POOLED_SIZE, inputs.strides, inputs.convention)
        layers: list[nn.Module] = []
        for i in range(num_convs):
            conv = nn.Conv2d(width if i else inputs.channels, width, 3, stride=1 if i else 2, padding=1)
            if init == "grid_rcnn":
                init_conv(conv)
            layers += [conv, nn.GroupNorm(_NORM_GROUPS, width), nn.ReLU(inplace=True)]
        self.convs = nn.Sequential(*layers)
        use_conv3x3(self.convs)
        self.fusion = PointFusion(point_channels) if fusion else None
        first = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, groups=NUM_POINTS)
        last = nn.ConvTranspose2d(width, NUM_POINTS, 4, stride=2, padding=1, groups=NUM_POINTS)
        if init == "grid_rcnn":
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
        """``rois`` with the boxes that the heatmaps predict, detached and not clipped to the image."""
        return rois.with_boxes(decode_heatmaps(output.heatmaps.detach(), rois.boxes, self.settings.mapping_ratio))

    def losses(self, output: GridOutput, rois: Rois, match: Match) -> dict[str, LossTerm]:
        """The grid loss of R ``rois`` whose objects are ``match``, times the loss weight.

        With fusion, it is the sum of the losses of the fused and of the unfused heatmaps.
        """
        targets = grid_targets(rois.boxes, match.boxes, self.settings.mapping_ratio)
        term = grid_loss(output.heatmaps, targets, rois.valid)
        if output.unfused_heatmaps is not None:
            unfused = grid_loss(output.unfused_heatmaps, targets, rois.valid)
            term = LossTerm(term.total + unfused.total, term.count)
        return {"grid": term.weighted(self.settings.loss_weight)}
