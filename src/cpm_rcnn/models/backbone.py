"""Backbones under one roof: images in, C2..C5 out; with an FPN on top, P2..P6 (spec section 2)."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, resnet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.errors import UserError, check_choice
from cpm_rcnn.models.tiny_backbone import TinyBackbone
from cpm_rcnn.ops import DeformConv2d

STRIDES = (4, 8, 16, 32, 64)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_64x4d")
# Parameters of timm's many networks that stand before the first stage.
_TIMM_STEMS = ("conv_stem", "bn1", "stem", "conv1", "patch_embed")


class ResNet(nn.Module):
    """torchvision's ResNet or ResNeXt with frozen BatchNorm.

    Args:
        name: torchvision's name, of :data:`RESNETS`.
        weights: torchvision's weight name (``IMAGENET1K_V1``), a local file, or None.
        frozen_stages: how many of stem, C2, C3, C4, C5 get no gradient.
        deformable: whether the 3x3 convolutions of C3..C5 are deformable.
        stride_in_1x1: whether a bottleneck's stride is on its first 1x1 (Caffe-style weights) and not on its 3x3.

    Raises:
        UserError: unknown weights, or a file that does not fit.
    """

    def __init__(
        self, name: str, weights: str | None, *, frozen_stages: int, deformable: bool, stride_in_1x1: bool
    ) -> None:
        super().__init__()
        net: resnet.ResNet = get_model(name, weights=None, norm_layer=FrozenBatchNorm2d)
        if weights is not None:
            _load(net, _read_resnet_weights(name, weights), weights, ignore=("fc.",))
        stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        bottlenecks = [block for stage in stages for block in stage if isinstance(block, resnet.Bottleneck)]
        if (deformable or stride_in_1x1) and not bottlenecks:
            raise UserError(
                f"backbone.name={name}: deformable and stride_in_1x1 need bottleneck blocks (resnet50 and up)"
            )
        if stride_in_1x1:
            for block in bottlenecks:
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        if deformable:
            for stage in stages[1:]:
                for block in stage:
                    block.conv2 = DeformConv2d(block.conv2)
        self.stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
        self.layers = nn.ModuleList(stages)
        self.channels = tuple(_out_channels(stage) for stage in stages)
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


class TimmBackbone(nn.Module):
    """Any timm model that gives features at strides 4, 8, 16 and 32, with its BatchNorm frozen.

    Args:
        name: timm's model name.
        weights: ``"pretrained"`` (timm downloads them), a local file (.safetensors, .pth), or None.
        frozen_stages: 0, or 1 to give the stem no gradient.

    Raises:
        UserError: timm is missing, or does not know the model, or the file does not fit.
    """

    def __init__(self, name: str, weights: str | None, *, frozen_stages: int) -> None:
        super().__init__()
        timm = _import_timm()
        if not timm.is_model(name):
            raise UserError(
                f"backbone.name={name}: neither 'tiny', nor one of {', '.join(RESNETS)}, nor a model that timm knows"
            )
        check_choice("backbone.frozen_stages", frozen_stages, (0, 1))
        probe = timm.create_model(name, features_only=True, pretrained=False)
        wanted = STRIDES[:4]
        reductions = probe.feature_info.reduction()
        if not set(wanted) <= set(reductions):
            raise UserError(
                f"backbone.name={name}: its features have strides {reductions}, but 4, 8, 16 and 32 are needed"
            )
        indices = [reductions.index(stride) for stride in wanted]
        self.net = _create_timm(timm, name, weights, indices)
        self.channels = tuple(self.net.feature_info.channels())
        # Some transformers keep their channels last.
        self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        timm.layers.freeze_batch_norm_2d(self.net)
        if frozen_stages:
            stem = [p for n, p in self.net.named_parameters() if n.startswith(_TIMM_STEMS)]
            if not stem:
                raise UserError(f"backbone.frozen_stages=1: do not know which parameters of {name} are its stem; use 0")
            for parameter in stem:
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """C2..C5 of ``images`` (B, 3, H, W)."""
        outputs = self.net(images)
        return [output.permute(0, 3, 1, 2) for output in outputs] if self.channels_last else outputs


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
    deformable: bool = False,
    stride_in_1x1: bool = False,
) -> nn.Module:
    """The backbone of that name.

    Args:
        name: ``tiny``, one of :data:`RESNETS`, or a timm model.
        weights: None, a weight name of torchvision, ``pretrained`` (timm), or a local file.
        frozen_stages: how many of stem, C2, ... get no gradient; None: with weights, stem and C2 of a ResNet and the
            stem of a timm model; without, none.
        deformable: ResNets only: deformable 3x3 convolutions in C3..C5.
        stride_in_1x1: ResNets only: Caffe-style stride placement.

    Raises:
        UserError: anything that does not fit together.
    """
    if frozen_stages is not None:
        check_choice("backbone.frozen_stages", frozen_stages, range(6))
    if name in RESNETS:
        frozen = (2 if weights else 0) if frozen_stages is None else frozen_stages
        return ResNet(name, weights, frozen_stages=frozen, deformable=deformable, stride_in_1x1=stride_in_1x1)
    if deformable or stride_in_1x1:
        raise UserError(f"backbone.name={name}: deformable and stride_in_1x1 are for {', '.join(RESNETS)}")
    if name == "tiny":
        if weights is not None or frozen_stages:
            raise UserError("backbone.name=tiny: trains from scratch, it takes neither weights nor frozen_stages")
        return TinyBackbone()
    frozen = (1 if weights else 0) if frozen_stages is None else frozen_stages
    return TimmBackbone(name, weights, frozen_stages=frozen)


def default_pixel_format(name: str) -> dict[str, Any]:
    """Arguments of :class:`~cpm_rcnn.models.pixel_format.PixelFormat` that suit the published weights of ``name``."""
    if name == "tiny" or name in RESNETS:
        return {"order": "rgb", "scale": 255.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    config = _import_timm().get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"backbone.name={name}: timm does not know it, or its pixel format; see backbone.pixel_format")
    return {"order": "rgb", "scale": 255.0, "mean": tuple(config.mean), "std": tuple(config.std)}


def _out_channels(stage: Sequence[nn.Module]) -> int:
    last = stage[-1]
    norm = last.bn3 if isinstance(last, resnet.Bottleneck) else last.bn2
    return norm.weight.shape[0]  # type: ignore[union-attr,return-value,index]


def _import_timm() -> Any:
    try:
        import timm
        import timm.layers
        import timm.models
    except ImportError:
        raise UserError("backbone=timm: timm is not installed; pip install 'cpm-rcnn[timm]'") from None
    return timm


def _create_timm(timm: Any, name: str, weights: str | None, indices: list[int]) -> Any:
    """Timm's feature extractor with its weights."""
    arguments = {"features_only": True, "out_indices": indices}
    if weights is None:
        return timm.create_model(name, **arguments)
    if weights == "pretrained":
        try:
            return timm.create_model(name, pretrained=True, **arguments)
        except Exception as error:  # each hub client has errors of its own
            raise UserError(
                f"backbone.weights=pretrained: timm cannot fetch {name} ({type(error).__name__}); "
                "download it elsewhere and give the file"
            ) from None
    state = _read_state_dict(weights)
    net = timm.create_model(name, **arguments)
    if not isinstance(net, (timm.models.FeatureListNet, timm.models.FeatureDictNet, timm.models.FeatureHookNet)):
        _load(net, state, weights, ignore=("conv_head.", "bn2.", "classifier.", "head.", "fc."))
        return net
    # timm renames the layers of these; it loads the file into the whole model before it takes the features.
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights}, **arguments)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"backbone.weights={weights}: does not fit {name}: {str(error).splitlines()[0]}") from None


def _read_resnet_weights(name: str, weights: str) -> dict[str, Tensor]:
    known = get_model_weights(name)
    if weights not in known.__members__:
        return _read_state_dict(weights, f"one of torchvision's {', '.join(known.__members__)}, or a local file")
    entry = known[weights]
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise UserError(
            f"backbone.weights={weights}: cannot fetch {entry.url} ({error}); download it elsewhere and give the file"
        ) from None


def _read_state_dict(file: str, allowed: str = "'pretrained' or a local file") -> dict[str, Tensor]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"backbone.weights={file}: no such file; allowed: null, {allowed}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"backbone.weights={file}: cannot be read as weights ({type(error).__name__})") from None
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and key in state:
            state = state[key]
    if not isinstance(state, Mapping):
        raise UserError(f"backbone.weights={file}: holds a {type(state).__name__}, not weights by name")
    return dict(state)


def _load(net: nn.Module, state: dict[str, Tensor], source: str, ignore: tuple[str, ...]) -> None:
    """Load ``state`` and refuse what does not fit; classifier layers (``ignore``) are not needed."""
    state = {k: v for k, v in state.items() if not k.startswith(ignore) and not k.endswith("num_batches_tracked")}
    wanted = {
        k: v for k, v in net.state_dict().items() if not k.startswith(ignore) and not k.endswith("num_batches_tracked")
    }
    missing = [k for k in wanted if k not in state]
    misshapen = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    unexpected = [k for k in state if k not in wanted]
    for what, names in (
        ("lacks", missing),
        ("has another shape for", misshapen),
        ("has an unknown", unexpected),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"backbone.weights={source}: {what} {', '.join(names[:3])}{more}")
    net.load_state_dict(state, strict=False)
