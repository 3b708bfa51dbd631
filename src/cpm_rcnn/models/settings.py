"""Settings of a whole model, as checkpoints store them and as :func:`~cpm_rcnn.models.build.build_detector` takes them.

A model is configured by the backbone's settings and one flat list of options, which contains those of the trunk, of the
RPN and of the head. Each option is a field of exactly one dataclass; this module assigns them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpm_rcnn.boxes import CONVENTIONS
from cpm_rcnn.errors import ArgumentError, check_choice
from cpm_rcnn.models.backbones import BackboneSettings
from cpm_rcnn.models.heads import HEADS
from cpm_rcnn.models.rpn import RPNSettings
from cpm_rcnn.settings import Settings, architecture, choice, integer, training


@dataclass(frozen=True)
class TrunkSettings(Settings):
    """Settings that concern the whole model: choice of the head, box convention and feature pyramid.

    Attributes:
        head: name of the RoI head, a key of :data:`~cpm_rcnn.models.heads.HEADS`.
        convention: box coordinate convention: ``continuous``, or ``inclusive`` for the released weights.
        fpn_channels: number of channels of each level of the feature pyramid.
        loss_mean: which RoIs (or anchors) a loss is the mean of: those of the whole ``run`` in a step, or those of a
            ``process``. With ``process``, an RoI counts less in a process with many of them.
    """

    head: str = architecture("cpm", check=lambda argument, value: check_choice(argument, value, tuple(HEADS)))
    convention: str = architecture("continuous", check=choice(*CONVENTIONS))
    fpn_channels: int = architecture(256, check=integer())
    loss_mean: str = training("run", check=choice("run", "process"))


@dataclass(frozen=True)
class ModelSettings:
    """All settings of a model except the number of classes.

    Attributes:
        backbone: settings of the backbone.
        trunk: name of the head, box convention and width of the feature pyramid.
        rpn: settings of the region proposal network.
        head: settings of the head, an instance of its ``settings_class``.
    """

    backbone: BackboneSettings
    trunk: TrunkSettings
    rpn: RPNSettings
    head: Settings

    @classmethod
    def from_options(cls, backbone: str | Mapping[str, Any] | BackboneSettings, **options: Any) -> "ModelSettings":
        """Settings from the backbone and the flat options of trunk, RPN and head.

        Args:
            backbone: a backbone name, a mapping of the fields of :class:`BackboneSettings`, or an instance of it.
            **options: fields of :class:`TrunkSettings`, :class:`~cpm_rcnn.models.rpn.RPNSettings` and the head's
                settings.

        Raises:
            ArgumentError: an option is unknown or its value is invalid. Errors about fields of a ``backbone`` mapping
                name them ``backbone.NAME``.
        """
        trunk = TrunkSettings(**_take(options, TrunkSettings))
        head_class = HEADS[trunk.head].settings_class
        allowed = [*TrunkSettings.names(), *RPNSettings.names(), *head_class.names()]
        if unknown := [name for name in options if name not in allowed]:
            raise ArgumentError(unknown[0], f": the head {trunk.head} has no such option; it has {', '.join(allowed)}")
        rpn = RPNSettings(**_take(options, RPNSettings))
        return cls(_backbone(backbone), trunk, rpn, head_class(**options))

    def to_options(self) -> dict[str, Any]:
        """The same settings as arguments of :meth:`from_options`, plain values only."""
        flat = self.trunk.to_dict() | self.rpn.to_dict() | self.head.to_dict()
        return {"backbone": self.backbone.to_dict(), **flat}

    def architecture(self) -> dict[str, Any]:
        """The options that decide the meaning or the shapes of the weights, by flat name."""
        return self._by_role("architecture")

    def training(self) -> dict[str, Any]:
        """The options that decide how the model is trained, by flat name."""
        return self._by_role("training")

    def _by_role(self, role: str) -> dict[str, Any]:
        found = {f"backbone.{name}": value for name, value in self.backbone.by_role(role).items()}
        return found | self.trunk.by_role(role) | self.rpn.by_role(role) | self.head.by_role(role)


def inference_options() -> list[str]:
    """Names of the options that can be overridden when a checkpoint is loaded, over all heads."""
    names = RPNSettings.names("inference")
    for head in HEADS.values():
        own = [*head.settings_class.names("inference"), *head.optional_parts]
        names += [name for name in own if name not in names]
    return names


def _backbone(value: str | Mapping[str, Any] | BackboneSettings) -> BackboneSettings:
    if isinstance(value, BackboneSettings):
        return value
    return BackboneSettings.from_dict({"name": value} if isinstance(value, str) else value, "backbone")


def _take(options: dict[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """Remove and return the options that belong to ``kind``."""
    return {name: options.pop(name) for name in kind.names() if name in options}
