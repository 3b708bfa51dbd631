"""Any timm model as a backbone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cpm_rcnn.errors import UserError, check_choice, check_file
from cpm_rcnn.weights.imagenet import check_range_of_pixels
from cpm_rcnn.models.backbones.resnet import RESNETS
from cpm_rcnn.weights.files import check_names, read_weights

_STRIDES = (4, 8, 16, 32)
# Parameters of timm's many networks that stand before the first stage.
_STEMS = ("conv_stem", "bn1", "stem", "conv1", "patch_embed")
# Layers behind the last feature map.
_HEADS = ("conv_head.", "bn2.", "classifier.", "head.", "fc.")


class TimmBackbone(nn.Module):
    """Any timm model that gives features at strides 4, 8, 16 and 32, with its BatchNorm frozen.

    Args:
        name: timm's model name.
        weights: ``"pretrained"`` (timm downloads them), a local file (.safetensors, .pth), or None.
        frozen_stages: 0, or 1 to give the stem no gradient.
        pixel_format: what the network will be fed; ``weights`` trained on another range are refused. None: unchecked.

    Raises:
        UserError: timm is missing, or does not know the model, or the file does not fit.
    """

    def __init__(
        self, name: str, weights: str | None, *, frozen_stages: int, pixel_format: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        timm = _import_timm()
        if not timm.is_model(name):
            raise UserError(
                f"backbone.name={name}: neither 'tiny', nor one of {', '.join(RESNETS)}, nor a model that timm knows"
            )
        check_choice("backbone.frozen_stages", frozen_stages, (0, 1))
        probe = timm.create_model(name, features_only=True, pretrained=False)
        reductions = probe.feature_info.reduction()
        if not set(_STRIDES) <= set(reductions):
            raise UserError(
                f"backbone.name={name}: its features have strides {reductions}, but 4, 8, 16 and 32 are needed"
            )
        indices = [reductions.index(stride) for stride in _STRIDES]
        self.net = _create(timm, name, weights, indices)
        self.channels = tuple(self.net.feature_info.channels())
        # Some transformers keep their channels last.
        self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        timm.layers.freeze_batch_norm_2d(self.net)
        if weights is not None and pixel_format is not None:
            _check_format(self.net, weights, pixel_format, timm_pixel_format(name))
        if frozen_stages:
            stem = [p for n, p in self.net.named_parameters() if n.startswith(_STEMS)]
            if not stem:
                raise UserError(f"backbone.frozen_stages=1: do not know which parameters of {name} are its stem; use 0")
            for parameter in stem:
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """C2..C5 of ``images`` (B, 3, H, W)."""
        outputs = self.net(images)
        return [output.permute(0, 3, 1, 2) for output in outputs] if self.channels_last else outputs


def timm_pixel_format(name: str) -> dict[str, Any]:
    """The pixel format of timm's weights of that name.

    Raises:
        UserError: timm is missing, or does not know the name.
    """
    config = _import_timm().get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"backbone.name={name}: timm does not know it, or its pixel format; see backbone.pixel_format")
    return {"order": "rgb", "scale": 255.0, "mean": tuple(config.mean), "std": tuple(config.std)}


def _import_timm() -> Any:
    try:
        import timm
        import timm.layers
        import timm.models
    except ImportError:
        raise UserError("backbone=timm: timm is not installed; pip install 'cpm-rcnn[timm]'") from None
    return timm


def _create(timm: Any, name: str, weights: str | None, indices: list[int]) -> Any:
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
    check_file("backbone.weights", weights, "null, pretrained (from timm), a local file")
    state = read_weights(weights, "backbone.weights")
    net = timm.create_model(name, **arguments)
    renamed = isinstance(net, (timm.models.FeatureListNet, timm.models.FeatureDictNet, timm.models.FeatureHookNet))
    whole = timm.create_model(name) if renamed else net
    own = {name: value.shape for name, value in _without_head(whole.state_dict()).items()}
    check_names(f"backbone.weights={weights}", _without_head(state), own)
    if not renamed:
        net.load_state_dict(_without_head(state), strict=False)
        return net
    # timm loads the weights into the whole model before it takes the features, under other names.
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **arguments)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"backbone.weights={weights}: does not fit {name}: {str(error).splitlines()[0]}") from None


def _without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(_HEADS) and not k.endswith("num_batches_tracked")}


def _check_format(net: nn.Module, weights: str, given: Mapping[str, Any], published: Mapping[str, Any]) -> None:
    """Refuse a pixel format other than timm says of the weights, or of another range than the first layer tells."""
    convolution = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    norm = next((m for m in net.modules() if getattr(m, "running_var", None) is not None), None)
    # A network without BatchNorm keeps no statistics.
    if convolution is not None and norm is not None and len(norm.running_var) == len(convolution.weight):  # type: ignore[arg-type]
        check_range_of_pixels(weights, convolution.weight, norm.weight, norm.running_var, given)  # type: ignore[arg-type]
    for key, value in published.items():
        ours = given[key]
        if list(ours) != list(value) if isinstance(value, tuple) else ours != value:
            raise UserError(
                f"backbone.weights={weights}: belongs to {key} {value} by timm; set backbone.pixel_format=null "
                "(or +backbone.check_weights=false for weights of your own)"
            )
