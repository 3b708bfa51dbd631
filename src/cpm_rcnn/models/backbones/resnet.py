"""ResNet and ResNeXt backbones (spec section 2)."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.errors import UserError, check_choice, check_count, check_flag, check_list
from cpm_rcnn.weights.imagenet import check_input_format, resnet_weights
from cpm_rcnn.ops import DeformConv2dPack
from cpm_rcnn.weights.files import check_names


@dataclass(frozen=True)
class ResNetLayout:
    """What tells the ResNets apart.

    Attributes:
        blocks: how many blocks C2, C3, C4 and C5 have.
        groups: groups of the 3x3 convolutions; 1 is ResNet, more are ResNeXt.
        width_per_group: channels a group in C2.
        bottleneck: whether blocks are 1x1, 3x3, 1x1, and not two 3x3.
    """

    blocks: Sequence[int]
    groups: int = 1
    width_per_group: int = 64
    bottleneck: bool = True

    def __post_init__(self) -> None:
        check_list("backbone.layout.blocks", self.blocks)
        if len(self.blocks) != 4:
            raise UserError(f"backbone.layout.blocks={list(self.blocks)}: must be four counts, for C2, C3, C4 and C5")
        for count in (*self.blocks, self.groups, self.width_per_group):
            check_count("backbone.layout", count)
        check_flag("backbone.layout.bottleneck", self.bottleneck)
        if not self.bottleneck and (self.groups, self.width_per_group) != (1, 64):
            raise UserError("backbone.layout: groups and width_per_group are for bottlenecks")


# Under torchvision's names.
RESNETS = {
    "resnet18": ResNetLayout((2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetLayout((3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetLayout((3, 4, 6, 3)),
    "resnet101": ResNetLayout((3, 4, 23, 3)),
    "resnext50_32x4d": ResNetLayout((3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_64x4d": ResNetLayout((3, 4, 23, 3), groups=64, width_per_group=4),
}
DEFORMABLE_STAGES = (3, 4, 5)


class ResNet(nn.Module):
    """torchvision's ResNet or ResNeXt with frozen BatchNorm.

    Args:
        name: one of :data:`RESNETS`; with a ``layout`` of its own any name.
        layout: the arguments of :class:`ResNetLayout`, or None: the name's.
        weights: torchvision's weight name (``IMAGENET1K_V1``), a local file, or None.
        frozen_stages: how many of stem, C2, C3, C4, C5 get no gradient.
        deformable_stages: which of 3, 4, 5 (C3..C5) have deformable 3x3 convolutions.
        stride_in_1x1: whether a bottleneck's stride is on its first 1x1 (Caffe-style weights) and not on its 3x3.
        pixel_format: what the network will be fed; ``weights`` trained on something else are refused. None: unchecked.

    Raises:
        UserError: unknown weights, a file that does not fit, or one for another pixel format or stride placement.
    """

    def __init__(
        self,
        name: str,
        layout: Mapping[str, Any] | None,
        weights: str | None,
        *,
        frozen_stages: int,
        deformable_stages: Sequence[int],
        stride_in_1x1: bool,
        pixel_format: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        shape = RESNETS[name] if layout is None else ResNetLayout(**layout)
        if (deformable_stages or stride_in_1x1) and not shape.bottleneck:
            raise UserError(
                f"backbone.name={name}: deformable_stages and stride_in_1x1 need bottlenecks (resnet50 and up)"
            )
        net = resnet.ResNet(
            resnet.Bottleneck if shape.bottleneck else resnet.BasicBlock,
            list(shape.blocks),
            groups=shape.groups,
            width_per_group=shape.width_per_group,
            norm_layer=FrozenBatchNorm2d,
        )
        del net.fc
        if weights is not None:
            state, origin = resnet_weights(name, weights)
            check_names(f"backbone.weights={weights}", state, {k: v.shape for k, v in net.state_dict().items()})
            if pixel_format is not None:
                check_input_format(weights, state, origin, pixel_format, stride_in_1x1)
            net.load_state_dict(state)
        stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        if stride_in_1x1:
            for block in _blocks(stages):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        for stage in set(deformable_stages):
            check_choice("backbone.deformable_stages", stage, DEFORMABLE_STAGES)
            for block in _blocks([stages[stage - 2]]):
                block.conv2 = DeformConv2dPack.from_conv(block.conv2)
        self.stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
        self.layers = nn.ModuleList(stages)
        self.channels = tuple(
            (block.bn3 if shape.bottleneck else block.bn2).weight.shape[0] for block in (stage[-1] for stage in stages)
        )
        for part in [self.stem, *stages][:frozen_stages]:
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """C2..C5 of ``images`` (B, 3, H, W)."""
        x = self.stem(images)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


def _blocks(stages: Sequence[nn.Sequential]) -> list[Any]:
    return [block for stage in stages for block in stage]
