"""Construct a backbone from its settings."""

from torch import nn

from cpm_rcnn.models.backbones.resnet import ResNet
from cpm_rcnn.models.backbones.settings import BackboneSettings
from cpm_rcnn.models.backbones.timm import TimmBackbone
from cpm_rcnn.models.backbones.tiny import TinyBackbone


def build_body(settings: BackboneSettings) -> nn.Module:
    """The backbone that ``settings`` describe, with random weights.

    Returns:
        A module that maps images (B, 3, H, W) to the list C2..C5; its ``channels`` are their numbers of channels.

    Raises:
        ArgumentError: timm is not installed or does not know the model, the model does not have strides 4, 8, 16 and
            32, or ``frozen_stages`` is invalid for it.
    """
    if settings.is_resnet:
        return ResNet(
            settings.resnet_layout,
            frozen_stages=settings.frozen(with_weights=2),
            deformable_stages=settings.deformable_stages,
            stride_in_1x1=settings.resolved_format.stride_in_1x1,
        )
    if settings.name == "tiny":
        return TinyBackbone()
    return TimmBackbone(settings.name, frozen_stages=settings.frozen(with_weights=1))
