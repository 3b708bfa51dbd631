"""Settings of the backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpm_rcnn.errors import ArgumentError, check_choice, check_list
from cpm_rcnn.models.backbones.input_format import NAMED_FORMATS, RGB, InputFormat
from cpm_rcnn.models.backbones.resnet import RESNETS, ResNetLayout
from cpm_rcnn.models.backbones.timm import timm_input_format
from cpm_rcnn.settings import Settings, architecture, choice, flag, optional, text, training

DEFORMABLE_STAGES = (3, 4, 5)


def _is_stages(argument: str, value: Any) -> None:
    check_list(argument, value)
    for stage in value:
        check_choice(argument, stage, DEFORMABLE_STAGES)


def _anything(argument: str, value: Any) -> None:
    """Accept any value; ``__post_init__`` checks it."""


@dataclass(frozen=True)
class BackboneSettings(Settings):
    """Settings of the backbone.

    Attributes:
        name: ``tiny``, a key of :data:`~cpm_rcnn.models.backbones.resnet.RESNETS`, ``resnet`` (with
            ``layout``), or the name of a timm model.
        weights: where the starting weights come from: None, a weight name of torchvision,
            ``resnext101_64x4d.gluon_in1k``, ``pretrained`` (timm), or a local file. Only
            :func:`cpm_rcnn.weights.initialize.initialize` reads it.
        frozen_stages: how many of stem, C2, C3, C4, C5 get no gradient. None freezes the stem and C2 of a ResNet and
            the stem of a timm model if ``weights`` is given, and nothing otherwise.
        deformable_stages: which of 3, 4, 5 (C3..C5) have deformable 3x3 convolutions; ResNets with bottlenecks only.
        input_format: ``rgb``, ``caffe``, ``timm``, or the values of
            :class:`~cpm_rcnn.models.backbones.input_format.InputFormat`. None is ``rgb`` for ResNets and ``timm`` for
            timm models. After construction, this is an ``InputFormat``.
        layout: the values of :class:`~cpm_rcnn.models.backbones.resnet.ResNetLayout`, for ``name=resnet``.
        check_weights: whether weights that seem to need another input format are refused.
    """

    name: str = architecture(check=text)
    weights: str | None = training(None, check=optional(text))
    frozen_stages: int | None = training(None, check=optional(choice(*range(6))))
    deformable_stages: Sequence[int] = architecture((), check=_is_stages)
    input_format: str | Mapping[str, Any] | InputFormat | None = architecture(None, check=_anything)
    layout: Mapping[str, Any] | ResNetLayout | None = architecture(None, check=_anything)
    check_weights: bool = training(True, check=flag)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.name == "resnet") != (self.layout is not None):
            raise ArgumentError("name", f"={self.name}: layout is required by, and only valid with, name=resnet")
        # The order has no meaning, and two models that differ only in it can share weights.
        object.__setattr__(self, "deformable_stages", tuple(sorted(set(self.deformable_stages))))
        if self.layout is not None and not isinstance(self.layout, ResNetLayout):
            object.__setattr__(self, "layout", ResNetLayout.from_dict(self.layout, "layout"))
        if self.is_resnet:
            if self.deformable_stages and not self.resnet_layout.bottleneck:
                raise ArgumentError(
                    "deformable_stages", f"={list(self.deformable_stages)}: {self.name} has no bottlenecks"
                )
        elif self.deformable_stages:
            raise ArgumentError(
                "deformable_stages", f"={list(self.deformable_stages)}: only for {', '.join(RESNETS)}, not {self.name}"
            )
        if self.name == "tiny" and (self.weights is not None or self.frozen_stages):
            raise ArgumentError("name", "=tiny: has no pretrained weights; weights and frozen_stages must be null")
        object.__setattr__(self, "input_format", self._resolved_format())

    @property
    def is_resnet(self) -> bool:
        """Whether the backbone is a ResNet or ResNeXt of this project."""
        return self.name == "resnet" or self.name in RESNETS

    @property
    def resnet_layout(self) -> ResNetLayout:
        """The layout of a ResNet."""
        return self.layout if isinstance(self.layout, ResNetLayout) else RESNETS[self.name]

    @property
    def resolved_format(self) -> InputFormat:
        """``input_format`` as an :class:`~cpm_rcnn.models.backbones.input_format.InputFormat`."""
        assert isinstance(self.input_format, InputFormat)
        return self.input_format

    def frozen(self, with_weights: int) -> int:
        """``frozen_stages``, or if it is None: ``with_weights`` if ``weights`` is given, otherwise 0."""
        if self.frozen_stages is not None:
            return self.frozen_stages
        return with_weights if self.weights is not None else 0

    def _resolved_format(self) -> InputFormat:
        # The values are stored in checkpoints, so that they do not depend on a later version of timm.
        value = self.input_format
        is_timm = not self.is_resnet and self.name != "tiny"
        if value is None:
            value = "timm" if is_timm else "rgb"
        if isinstance(value, str):
            check_choice("input_format", value, (*NAMED_FORMATS, "timm"))
            if value == "timm":
                return timm_input_format(self.name) if is_timm else RGB
            value = NAMED_FORMATS[value]
        elif not isinstance(value, InputFormat):
            value = InputFormat.from_dict(value, "input_format")
        if value.stride_in_1x1 and not (self.is_resnet and self.resnet_layout.can_stride_in_1x1):
            return replace(value, stride_in_1x1=False)
        return value
