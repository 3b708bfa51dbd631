"""Any timm model as a backbone."""

import copy
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.backbones.frozen_norm import fold_once
from cpm_rcnn.models.backbones.input_format import InputFormat
from cpm_rcnn.models.backbones.resnet import RESNETS

_STRIDES = (4, 8, 16, 32)
# Prefixes of the names that timm's models give to the parameters before the first stage.
_STEMS = ("conv_stem", "bn1", "stem", "conv1", "patch_embed")

# Height and width of the image with which folded weights are checked, so that C5 has several cells.
_PROBE_SIZE = (96, 128)


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

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Fold BatchNorm into the weights; only for inference.

        timm's blocks run their layers in many ways, so the pairs of convolution and BatchNorm are observed in one
        forward pass. If the features of the folded network differ, nothing is folded.
        """
        if not any(_is_frozen_norm(layer) for layer in self.net.modules()):
            return
        parameter = next(self.net.parameters())
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, 3, *_PROBE_SIZE, generator=generator).to(parameter)
        net = copy.deepcopy(self.net).eval()
        pairs, expected = _observed_pairs(net, images)
        for conv_name, norm_name in pairs:
            norm: Any = net.get_submodule(norm_name)
            fold_once(net.get_submodule(conv_name), norm)
            rest = [norm.drop, norm.act] if hasattr(norm, "act") else []
            net.set_submodule(norm_name, nn.Sequential(*rest))
        tolerance = torch.finfo(parameter.dtype).eps ** 0.5
        if all((a - b).norm() <= tolerance * b.norm() for a, b in zip(net(images), expected, strict=True)):
            self.net = net.train(self.net.training)


def _observed_pairs(net: nn.Module, images: Tensor) -> tuple[list[tuple[str, str]], list[Tensor]]:
    """Names of convolutions and of the frozen BatchNorm that gets their output, and the features of ``images``."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    calls: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []

    def after_conv(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        calls[name] += 1
        # The tensor is kept, because another one could get its id.
        outputs[id(output)] = name, output

    def before_norm(name: str, module: nn.Module, args: Any) -> None:
        calls[name] += 1
        if id(args[0]) in outputs:
            pairs.append((outputs[id(args[0])][0], name))

    handles = []
    for name, module in net.named_modules():
        # A subclass may compute its weight in another way.
        if type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame":
            handles.append(module.register_forward_hook(partial(after_conv, name)))
        elif _is_frozen_norm(module):
            handles.append(module.register_forward_pre_hook(partial(before_norm, name)))
    features = net(images)
    for handle in handles:
        handle.remove()
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)], features


def _is_frozen_norm(module: nn.Module) -> bool:
    """Whether it is torchvision's frozen BatchNorm, or timm's, which contains the activation."""
    return type(module).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")


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
