"""ResNet and ResNeXt backbones (docs/method.md section 2)."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.backbones.frozen_norm import conv_norm, fold_once
from cpm_rcnn.ops import DeformConv2dPack
from cpm_rcnn.ops.conv3x3 import use_conv3x3
from cpm_rcnn.settings import Settings, architecture, flag, integer, list_of


@dataclass(frozen=True)
class ResNetLayout(Settings):
    """The structure of a ResNet or ResNeXt.

    Attributes:
        blocks: number of blocks in C2, C3, C4 and C5.
        groups: groups of the 3x3 convolutions; 1 is ResNet, more are ResNeXt.
        width_per_group: channels per group in C2.
        bottleneck: whether blocks are 1x1, 3x3, 1x1 convolutions instead of two 3x3.
    """

    blocks: Sequence[int] = architecture(check=list_of(integer(), 4))
    groups: int = architecture(1, check=integer())
    width_per_group: int = architecture(64, check=integer())
    bottleneck: bool = architecture(True, check=flag)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bottleneck and (self.groups, self.width_per_group) != (1, 64):
            raise ArgumentError("bottleneck", "=False: groups and width_per_group need bottlenecks")

    @property
    def can_stride_in_1x1(self) -> bool:
        """Whether Caffe-style weights of this layout have a bottleneck's stride on the first 1x1 convolution."""
        return self.bottleneck and self.groups == 1


# The keys are torchvision's names, and for a network that it does not have, a name of the same form.
RESNETS = {
    "resnet18": ResNetLayout((2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetLayout((3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetLayout((3, 4, 6, 3)),
    "resnet101": ResNetLayout((3, 4, 23, 3)),
    "resnext50_32x4d": ResNetLayout((3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x4d": ResNetLayout((3, 4, 23, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": ResNetLayout((3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": ResNetLayout((3, 4, 23, 3), groups=64, width_per_group=4),
}


class _BasicBlock(resnet.BasicBlock):
    """torchvision's block with BatchNorm folded into the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(conv_norm(x, self.conv1, self.bn1))
        y = conv_norm(y, self.conv2, self.bn2)
        y += x if self.downsample is None else conv_norm(x, *self.downsample)
        return self.relu(y)


class _Bottleneck(resnet.Bottleneck):
    """torchvision's block with BatchNorm folded into the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(conv_norm(x, self.conv1, self.bn1))
        y = self.relu(conv_norm(y, self.conv2, self.bn2))
        y = conv_norm(y, self.conv3, self.bn3)
        y += x if self.downsample is None else conv_norm(x, *self.downsample)
        return self.relu(y)


class ResNet(nn.Module):
    """torchvision's ResNet or ResNeXt with frozen BatchNorm, which is folded into the convolutions when they run.

    Args:
        layout: blocks, groups and widths.
        frozen_stages: how many of stem, C2, C3, C4, C5 get no gradient.
        deformable_stages: which of 3, 4, 5 (C3..C5) have deformable 3x3 convolutions.
        stride_in_1x1: whether a bottleneck's stride is on its first 1x1 convolution and not on its 3x3.

    Attributes:
        channels: channels of C2..C5.
    """

    def __init__(
        self,
        layout: ResNetLayout,
        *,
        frozen_stages: int = 0,
        deformable_stages: Sequence[int] = (),
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        net = resnet.ResNet(
            _Bottleneck if layout.bottleneck else _BasicBlock,
            list(layout.blocks),
            groups=layout.groups,
            width_per_group=layout.width_per_group,
            norm_layer=FrozenBatchNorm2d,
        )
        stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        if stride_in_1x1:
            for block in _blocks(stages):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        for stage in deformable_stages:
            for block in _blocks([stages[stage - 2]]):
                block.conv2 = DeformConv2dPack.from_conv(block.conv2)
        use_conv3x3(net)
        self.stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
        self.layers = nn.ModuleList(stages)
        self.channels = tuple(
            (block.bn3 if layout.bottleneck else block.bn2).weight.shape[0] for block in (stage[-1] for stage in stages)
        )
        for part in [self.stem, *stages][:frozen_stages]:
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """C2..C5 of ``images`` (B, 3, H, W)."""
        stem: Any = self.stem
        x = stem.maxpool(stem.relu(conv_norm(images, stem.conv1, stem.bn1)))
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs

    def fold_norms(self) -> None:
        """Fold BatchNorm into the weights, which then get no gradient; only for inference."""
        for module in self.modules():
            # In the stem, the blocks and the shortcuts, each BatchNorm is registered after its convolution.
            children = list(module.named_children())
            for (_, conv), (name, norm) in pairwise(children):
                if isinstance(norm, FrozenBatchNorm2d):
                    fold_once(conv, norm)
                    module.register_module(name, nn.Identity())


def _blocks(stages: Sequence[nn.Sequential]) -> list[Any]:
    return [block for stage in stages for block in stage]
