"""Settings of a whole model, as checkpoints store them and as :func:`~cpm_rcnn.models.build.build_detector` takes them.

To its users a model has one flat list of options beside the backbone's: those of the trunk, of the RPN and of the head.
Each belongs to exactly one dataclass; this module distributes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpm_rcnn.boxes import CONVENTIONS
from cpm_rcnn.errors import check_choice, check_keys
from cpm_rcnn.models.backbones import BackboneSettings
from cpm_rcnn.models.heads import HEADS
from cpm_rcnn.models.rpn import RPNSettings
from cpm_rcnn.settings import Settings, architecture, choice, integer


@dataclass(frozen=True)
class TrunkSettings(Settings):
    """Settings that the RPN and the head share.

    Attributes:
        head: name of the RoI head, a key of :data:`~cpm_rcnn.models.heads.HEADS`.
        convention: the box coordinate convention: ``continuous``, or ``inclusive`` for the released weights.
        fpn_channels: channels of the feature pyramid.
    """

    head: str = architecture("cpm", check=lambda argument, value: check_choice(argument, value, tuple(HEADS)))
    convention: str = architecture("continuous", check=choice(*CONVENTIONS))
    fpn_channels: int = architecture(256, check=integer())


@dataclass(frozen=True)
class ModelSettings:
    """Settings of a whole model but the number of classes.

    Attributes:
        backbone: the backbone's.
        trunk: head name, convention and pyramid.
        rpn: the region proposal network's.
        head: an instance of the head's ``settings_class``.
    """

    backbone: BackboneSettings
    trunk: TrunkSettings
    rpn: RPNSettings
    head: Settings

    @classmethod
    def from_options(cls, backbone: str | Mapping[str, Any] | BackboneSettings, **options: Any) -> "ModelSettings":
        """Settings from the backbone and the flat options of trunk, RPN and head.

        Args:
            backbone: a backbone name, or a mapping of the fields of :class:`BackboneSettings`.
            **options: fields of :class:`TrunkSettings`, :class:`~cpm_rcnn.models.rpn.RPNSettings` and the head's
                settings.

        Raises:
            ArgumentError: an option is unknown or its value invalid; one of the backbone is named ``backbone.NAME``.
        """
        trunk = TrunkSettings(**_take(options, TrunkSettings))
        head_class = HEADS[trunk.head].settings_class
        allowed = [*TrunkSettings.names(), *RPNSettings.names(), *head_class.names()]
        check_keys(f"head={trunk.head}", options, allowed)
        rpn = RPNSettings(**_take(options, RPNSettings))
        return cls(_backbone(backbone), trunk, rpn, head_class(**options))

    def to_options(self) -> dict[str, Any]:
        """Plain arguments of :meth:`from_options` that give the same settings."""
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
        names += [name for name in head.settings_class.names("inference") if name not in names]
    return names


def _backbone(value: str | Mapping[str, Any] | BackboneSettings) -> BackboneSettings:
    if isinstance(value, BackboneSettings):
        return value
    return BackboneSettings.from_dict({"name": value} if isinstance(value, str) else value, "backbone")


def _take(options: dict[str, Any], kind: type[Settings]) -> dict[str, Any]:
    """Remove and return the options that belong to ``kind``."""
    return {name: options.pop(name) for name in kind.names() if name in options}
