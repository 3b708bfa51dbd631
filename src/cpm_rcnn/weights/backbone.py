"""Load pretrained weights into a backbone that has been built."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.backbones import BackboneSettings
from cpm_rcnn.models.backbones.resnet import ResNet
from cpm_rcnn.models.backbones.timm import TimmBackbone, import_timm, timm_input_format
from cpm_rcnn.remote.files import local_file
from cpm_rcnn.weights.imagenet import check_pixel_range, resnet_weights
from cpm_rcnn.weights.reading import check_names, read_weights

_ARGUMENT = "backbone.weights"
# Prefixes of timm's names of the layers after the last feature map.
_TIMM_HEADS = ("conv_head.", "bn2.", "classifier.", "head.", "fc.")


def load_backbone(body: nn.Module, settings: BackboneSettings, weights: str) -> None:
    """Load pretrained weights into a backbone.

    Args:
        body: the backbone, built from ``settings``.
        settings: settings of the backbone; its ``input_format`` must be the one that the weights were trained with.
        weights: a weight name of torchvision, a name in :data:`~cpm_rcnn.weights.imagenet.TIMM_FILES`, ``pretrained``
            (timm), or a file or URL.

    Raises:
        UserError: the weights are unknown, or the file does not exist, is damaged, does not fit the backbone, or was
            trained with another input format.
    """
    if isinstance(body, ResNet):
        _load_resnet(body, settings, weights)
    elif isinstance(body, TimmBackbone):
        _load_timm(body, settings, weights)
    else:
        raise ArgumentError(_ARGUMENT, f"={weights}: there are no pretrained weights for {settings.name}")


def _load_resnet(body: ResNet, settings: BackboneSettings, weights: str) -> None:
    state, source = resnet_weights(settings.name, weights)
    own = {_torchvision_name(name): name for name in body.state_dict() if "conv_offset" not in name}
    shapes = {name: value.shape for name, value in body.state_dict().items()}
    check_names(f"{_ARGUMENT}={weights}", state, {theirs: shapes[ours] for theirs, ours in own.items()})
    if settings.check_weights:
        variance = None if source.merged else state["bn1.running_var"]
        check_pixel_range(weights, state["conv1.weight"], state["bn1.weight"], variance, settings.resolved_format)
        if source.caffe2 and settings.resolved_format.order != "bgr":
            raise ArgumentError(
                _ARGUMENT,
                f"={weights}: Caffe2's networks read BGR images; set backbone.input_format=caffe "
                "(or backbone.check_weights=false for weights unlike the published ones)",
            )
    body.load_state_dict({own[name]: value for name, value in state.items()}, strict=False)


def _torchvision_name(name: str) -> str:
    """The name that torchvision gives to a parameter of this project's ResNet."""
    if name.startswith("layers."):
        _, index, rest = name.split(".", 2)
        return f"layer{int(index) + 1}.{rest}"
    return name.removeprefix("stem.")


def _load_timm(body: TimmBackbone, settings: BackboneSettings, weights: str) -> None:
    timm = import_timm()
    # timm's feature extractors have other parameter names than its files, so timm itself loads them, into a second
    # network.
    net = _pretrained_timm(timm, body, weights)
    timm.layers.freeze_batch_norm_2d(net)
    if settings.check_weights:
        _check_timm_format(net, settings, weights)
    body.net.load_state_dict(net.state_dict())


def _pretrained_timm(timm: Any, body: TimmBackbone, weights: str) -> Any:
    """A feature extractor like ``body.net`` with the given weights."""
    name, arguments = body.name, body.arguments
    if weights == "pretrained":
        try:
            return timm.create_model(name, pretrained=True, **arguments)
        except Exception as error:  # each hub client raises its own errors
            raise ArgumentError(
                _ARGUMENT,
                f"=pretrained: timm cannot download {name} ({_reason(error)}); download it elsewhere and give the file",
            ) from None
    local_file(_ARGUMENT, weights, "null, pretrained (from timm), a local file or a URL")
    state = read_weights(weights, _ARGUMENT)
    net = timm.create_model(name, **arguments)
    renamed = isinstance(net, (timm.models.FeatureListNet, timm.models.FeatureDictNet, timm.models.FeatureHookNet))
    whole = timm.create_model(name) if renamed else net
    shapes = {name: value.shape for name, value in _without_head(whole.state_dict()).items()}
    check_names(f"{_ARGUMENT}={weights}", _without_head(state), shapes)
    if not renamed:
        net.load_state_dict(_without_head(state), strict=False)
        return net
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **arguments)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ArgumentError(_ARGUMENT, f"={weights}: does not fit {name}: {str(error).splitlines()[0]}") from None


def _reason(error: Exception) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def _without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(_TIMM_HEADS) and not k.endswith("num_batches_tracked")}


def _check_timm_format(net: nn.Module, settings: BackboneSettings, weights: str) -> None:
    """Refuse an input format that differs from timm's for the weights, or from the statistics of the first layer."""
    ours, published = settings.resolved_format, timm_input_format(settings.name)
    convolution = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    norm = next((m for m in net.modules() if getattr(m, "running_var", None) is not None), None)
    # A network without BatchNorm stores no statistics.
    if convolution is not None and norm is not None and len(norm.running_var) == len(convolution.weight):  # type: ignore[arg-type]
        check_pixel_range(weights, convolution.weight, norm.weight, norm.running_var, ours)  # type: ignore[arg-type]
    if ours.to_dict() != published.to_dict():
        raise ArgumentError(
            _ARGUMENT,
            f"={weights}: timm's weights need {published.to_dict()}; set backbone.input_format=timm "
            "(or backbone.check_weights=false for weights of your own)",
        )
