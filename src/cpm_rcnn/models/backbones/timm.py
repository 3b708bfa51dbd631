"""Any timm model as a backbone."""

from typing import Any

from torch import Tensor, nn

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.backbones.input_format import InputFormat
from cpm_rcnn.models.backbones.resnet import RESNETS

_STRIDES = (4, 8, 16, 32)
# Prefixes of the names that timm's models give to the parameters before the first stage.
_STEMS = ("conv_stem", "bn1", "stem", "conv1", "patch_embed")


class TimmBackbone(nn.Module):
    """A timm model with features at strides 4, 8, 16 and 32; its BatchNorm is frozen.

    Args:
        name: timm's model name.
        frozen_stages: 0, or 1 to give the stem no gradient.

    Attributes:
        name: timm's model name.
        channels: channels of C2..C5.
        arguments: keyword arguments of ``timm.create_model`` that give the same feature extractor.

    Raises:
        ArgumentError: timm is not installed or does not know the model, the model does not have these strides, or
            ``frozen_stages`` is invalid for it.
    """

    def __init__(self, name: str, *, frozen_stages: int = 0) -> None:
        super().__init__()
        timm = import_timm()
        _pretrained_config(timm, name)  # raises if timm does not know the name
        if frozen_stages > 1:
            raise ArgumentError("frozen_stages", f"={frozen_stages}: must be one of 0, 1 for timm models")
        probe = timm.create_model(name, features_only=True, pretrained=False)
        reductions = probe.feature_info.reduction()
        if not set(_STRIDES) <= set(reductions):
            raise ArgumentError(
                "name", f"={name}: its features have strides {reductions}, but 4, 8, 16 and 32 are needed"
            )
        self.name = name
        self.arguments = {"features_only": True, "out_indices": [reductions.index(stride) for stride in _STRIDES]}
        self.net = timm.create_model(name, **self.arguments)
        self.channels = tuple(self.net.feature_info.channels())
        # Some transformers return (B, H, W, C).
        self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        timm.layers.freeze_batch_norm_2d(self.net)
        if frozen_stages:
            stem = [p for n, p in self.net.named_parameters() if n.startswith(_STEMS)]
            if not stem:
                raise ArgumentError(
                    "frozen_stages", f"=1: cannot identify the stem of {name} by parameter names; use 0"
                )
            for parameter in stem:
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """C2..C5 of ``images`` (B, 3, H, W)."""
        outputs = self.net(images)
        return [output.permute(0, 3, 1, 2) for output in outputs] if self.channels_last else outputs


def timm_input_format(name: str) -> InputFormat:
    """The input format of the pretrained weights of the timm model ``name``.

    Raises:
        ArgumentError: timm is not installed, does not know the model, or does not know its input format.
    """
    config = _pretrained_config(import_timm(), name)
    if config is None:
        raise ArgumentError("name", f"={name}: timm does not know its input format; give input_format")
    return InputFormat("rgb", 255, tuple(config.mean), tuple(config.std))


def _pretrained_config(timm: Any, name: str) -> Any:
    """The description of the pretrained weights of ``name``; None if there are none."""
    if not timm.is_model(name):
        raise ArgumentError("name", f"={name}: not 'tiny', not one of {', '.join(RESNETS)}, and not a model of timm")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ArgumentError("name", f"={name}: {error}") from None


def import_timm() -> Any:
    """The optional package timm.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        import timm
        import timm.layers
        import timm.models
    except ImportError:
        raise ArgumentError("name", ": timm is not installed; pip install 'cpm-rcnn[timm]'") from None
    return timm
