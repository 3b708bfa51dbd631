"""Construct a detector from its settings; no file is read."""

from collections.abc import Mapping
from typing import Any

from cpm_rcnn.boxes import CONVENTIONS
from cpm_rcnn.errors import ArgumentError, check_count
from cpm_rcnn.models.backbones import BackboneSettings, build_body
from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.models.fpn import STRIDES, FPNBackbone
from cpm_rcnn.models.heads import HEADS, HeadInputs
from cpm_rcnn.models.preprocess import ImagePreprocessor
from cpm_rcnn.models.rpn import RegionProposalNetwork
from cpm_rcnn.models.settings import ModelSettings


def build_detector(
    backbone: str | Mapping[str, Any] | BackboneSettings = "resnet50", num_classes: int = 80, **options: Any
) -> TwoStageDetector:
    """A detector with random weights; the defaults are the paper's CPM R-CNN.

    Args:
        backbone: a name (``tiny``, ``resnet18`` .. ``resnext101_64x4d``, or a timm model), or a mapping of the fields
            of :class:`~cpm_rcnn.models.backbones.BackboneSettings`.
        num_classes: number of foreground classes C; labels are 1..C.
        **options: ``head``, ``convention`` and ``fpn_channels`` (:class:`~cpm_rcnn.models.settings.TrunkSettings`),
            the fields of :class:`~cpm_rcnn.models.rpn.RPNSettings` and those of the head, for ``head="cpm"``
            :class:`~cpm_rcnn.models.heads.cpm.CPMSettings`.

    Raises:
        ArgumentError: an option is unknown or its value invalid.
    """
    return build(ModelSettings.from_options(backbone, **options), num_classes)


def build(settings: ModelSettings, num_classes: int) -> TwoStageDetector:
    """The detector that ``settings`` describe, with random weights.

    Args:
        settings: settings of backbone, trunk, RPN and head.
        num_classes: number of foreground classes C; labels are 1..C.

    Raises:
        ArgumentError: ``num_classes`` is not a positive integer, or timm is not installed or does not provide the
            backbone.
    """
    check_count("num_classes", num_classes)
    trunk = settings.trunk
    convention = CONVENTIONS[trunk.convention]
    try:
        body = build_body(settings.backbone)
    except ArgumentError as error:
        raise error.under("backbone") from None
    inputs = HeadInputs(trunk.fpn_channels, STRIDES[:-1], num_classes, convention)
    return TwoStageDetector(
        settings,
        num_classes,
        ImagePreprocessor(settings.backbone.resolved_format, convention),
        FPNBackbone(body, trunk.fpn_channels),
        RegionProposalNetwork(settings.rpn, trunk.fpn_channels, STRIDES, convention),
        HEADS[trunk.head](settings.head, inputs),
    )
