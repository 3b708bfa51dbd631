"""A backbone with a feature pyramid on top (docs/method.md section 2)."""

from collections import OrderedDict

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cpm_rcnn.ops.conv3x3 import use_conv3x3

# Strides of P2..P6 in pixels. Heads pool from all but the last.
STRIDES = (4, 8, 16, 32, 64)


class FPNBackbone(nn.Module):
    """A backbone and its feature pyramid.

    Args:
        body: maps images (B, 3, H, W) to the list C2..C5; ``body.channels`` are their numbers of channels. Its method
            ``fold_norms``, which is optional, folds frozen BatchNorm into the weights for inference.
        out_channels: number of channels of each pyramid level.
    """

    def __init__(self, body: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(list(body.channels), out_channels, LastLevelMaxPool())  # type: ignore[arg-type]
        use_conv3x3(self.fpn)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """P2..P6 of ``images`` (B, 3, H, W), named ``p2`` .. ``p6``; H and W must be multiples of 32."""
        features = self.body(images)
        pyramid = self.fpn(OrderedDict(zip(("p2", "p3", "p4", "p5"), features)))
        pyramid["p6"] = pyramid.pop("pool")
        return pyramid
