"""Backbones under one roof: images in, C2..C5 out; with an FPN on top, P2..P6 (spec section 2)."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cpm_rcnn.errors import UserError, check_choice, check_keys, check_list
from cpm_rcnn.models.backbones.resnet import RESNETS, ResNet, ResNetLayout
from cpm_rcnn.models.backbones.timm import TimmBackbone, timm_pixel_format
from cpm_rcnn.models.backbones.tiny import TinyBackbone

STRIDES = (4, 8, 16, 32, 64)


class FPNBackbone(nn.Module):
    """A backbone and its feature pyramid.

    Args:
        body: gives C2..C5 and has ``channels``.
        out_channels: channels of the pyramid.
    """

    def __init__(self, body: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(list(body.channels), out_channels, LastLevelMaxPool())  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """P2..P6 of ``images`` (B, 3, H, W), H and W multiples of 32, under the names ``p2`` .. ``p6``."""
        features = self.body(images)
        pyramid = self.fpn(OrderedDict(zip(("p2", "p3", "p4", "p5"), features)))
        pyramid["p6"] = pyramid.pop("pool")
        return pyramid


def build_body(
    name: str,
    weights: str | None = None,
    frozen_stages: int | None = None,
    deformable_stages: Sequence[int] = (),
    stride_in_1x1: bool = False,
    layout: Mapping[str, Any] | None = None,
    check_weights: bool = True,
    pixel_format: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The backbone of that name.

    Args:
        name: ``tiny``, one of :data:`RESNETS`, ``resnet`` (with ``layout``), or a timm model.
        weights: None, a weight name of torchvision, ``pretrained`` (timm), or a local file.
        frozen_stages: how many of stem, C2, ... get no gradient; None: with weights, stem and C2 of a ResNet and the
            stem of a timm model; without, none.
        deformable_stages: ResNets only: which of 3, 4, 5 (C3..C5) have deformable 3x3 convolutions.
        stride_in_1x1: ResNets only: Caffe-style stride placement.
        layout: of ``name="resnet"``: arguments of :class:`~cpm_rcnn.models.backbones.resnet.ResNetLayout`.
        check_weights: whether weights trained on other images than ``pixel_format`` says are refused.
        pixel_format: what the network will be fed; None: unknown, and not checked.

    Raises:
        UserError: anything that does not fit together.
    """
    if frozen_stages is not None:
        check_choice("backbone.frozen_stages", frozen_stages, range(6))
    check_list("backbone.deformable_stages", deformable_stages)
    fed = pixel_format if check_weights else None
    if (name == "resnet") != (layout is not None):
        raise UserError(f"backbone.name={name}: backbone.layout is needed by, and only by, name=resnet")
    if layout is not None:
        check_keys("backbone.layout", layout, ResNetLayout.__dataclass_fields__, ["blocks"])
    if name in RESNETS or name == "resnet":
        return ResNet(
            name,
            layout,
            weights,
            frozen_stages=(2 if weights else 0) if frozen_stages is None else frozen_stages,
            deformable_stages=deformable_stages,
            stride_in_1x1=stride_in_1x1,
            pixel_format=fed,
        )
    if deformable_stages or stride_in_1x1:
        raise UserError(f"backbone.name={name}: deformable_stages and stride_in_1x1 are for {', '.join(RESNETS)}")
    if name == "tiny":
        if weights is not None or frozen_stages:
            raise UserError("backbone.name=tiny: trains from scratch, it takes neither weights nor frozen_stages")
        return TinyBackbone()
    frozen = (1 if weights else 0) if frozen_stages is None else frozen_stages
    return TimmBackbone(name, weights, frozen_stages=frozen, pixel_format=fed)


def default_pixel_format(name: str) -> dict[str, Any]:
    """Arguments of :class:`~cpm_rcnn.models.preprocess.ImagePreprocessor` that suit the published weights of ``name``."""
    if name in ("tiny", "resnet") or name in RESNETS:
        return {"order": "rgb", "scale": 255.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return timm_pixel_format(name)
