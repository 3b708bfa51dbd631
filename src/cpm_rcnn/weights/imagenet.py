"""ImageNet weights of ResNets from several programs: parameter names and pixel ranges.

See docs/method.md sections 2 and 10.
"""

import logging
import re
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.hub import load_state_dict_from_url
from torchvision.models import get_model_weights, list_models
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.backbones import BackboneSettings, InputFormat
from cpm_rcnn.models.backbones.resnet import RESNETS
from cpm_rcnn.remote.files import local_file
from cpm_rcnn.weights.reading import read_weights

# Standard deviation of ImageNet's pixels in 0..255.
_STD = 57.6
# About the square root of the factor between the two pixel ranges.
_TOLERANCE = 8.0
# Standard deviation of the stem's outputs after its BatchNorm, assumed if a merged BatchNorm stores no variance;
# measured on ResNets.
_TYPICAL_SPREAD = 0.3

_log = logging.getLogger(__name__)

# Weights that torchvision does not have, by timm's name, and the file that timm's description of them names. timm is
# not needed to read it: the parameter names are torchvision's. torch.hub compares the file with the hash in its name.
TIMM_FILES = {
    "resnext101_64x4d.gluon_in1k": "https://github.com/rwightman/pytorch-pretrained-gluonresnet/releases/download/v0.1/"
    "gluon_resnext101_64x4d-f9a8e184.pth",
}
# Parts of the addresses by which torchvision names its newer, longer recipe.
_NEW_RECIPE = ("new-recipe", "vision/issues/3995", "vision/pull/5935")

_CAFFE2_LAYERS = {"branch1": "downsample.0", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_CAFFE2_NORMS = {"branch1": "downsample.1", "branch2a": "bn1", "branch2b": "bn2", "branch2c": "bn3"}


class WeightSource(NamedTuple):
    """The origin of a weight file, derived from its parameter names.

    Attributes:
        caffe2: the names are Caffe2's (Detectron, detectron2's MSRA files), whose networks read BGR images.
        merged: each BatchNorm is stored as a scale and a shift, without statistics.
    """

    caffe2: bool
    merged: bool


def resnet_weights(name: str, weights: str) -> tuple[dict[str, Tensor], WeightSource]:
    """ImageNet weights of a ResNet by torchvision's names, without the classifier.

    Args:
        name: torchvision's name of the network, or another name if it has none.
        weights: torchvision's weight name, a name in :data:`TIMM_FILES`, or a file or URL: a ``.pth`` or
            ``.safetensors`` of torchvision, timm or the CPM R-CNN release (they share their names), or a ``.pkl`` of
            detectron2 or Caffe2.

    Raises:
        UserError: the weights are unknown or cannot be downloaded, or the file does not exist or is damaged.
    """
    known = _torchvision_weights(name)
    others = {key: url for key, url in TIMM_FILES.items() if key.partition(".")[0] == name}
    if weights in known or weights in others:
        state = _download(weights, known, others)
    else:
        local_file("backbone.weights", weights, ", ".join(["null", *others, *known, "a local file or a URL"]))
        state = read_weights(weights, "backbone.weights")
    caffe2 = "conv1_w" in state
    if caffe2:
        state = _from_caffe2(state)
    elif "stem.conv1.weight" in state:
        state = _from_detectron2(state)
    state = {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    merged = "bn1.running_var" not in state
    return with_statistics(state), WeightSource(caffe2, merged)


def warn_of_new_recipe(settings: BackboneSettings) -> None:
    """Log one line if the starting weights come from torchvision's newer recipe, which suits SGD training badly.

    Args:
        settings: settings of the backbone of a training with SGD and frozen BatchNorm.
    """
    known = _torchvision_weights(settings.name)
    if settings.weights is None or settings.weights not in known:
        return
    recipe = str(known[settings.weights].meta.get("recipe"))
    if any(part in recipe for part in _NEW_RECIPE):
        old = [key for key in TIMM_FILES if key.partition(".")[0] == settings.name] or ["IMAGENET1K_V1"]
        _log.warning(
            "backbone.weights=%s: trained with torchvision's newer recipe; such weights are known to cost several "
            "points of AP with SGD and frozen BatchNorm; backbone.weights=%s is of an older recipe",
            settings.weights,
            old[0],
        )


def _torchvision_weights(name: str) -> Mapping[str, Any]:
    """Torchvision's weights of a ResNet by name; none for other networks."""
    return get_model_weights(name).__members__ if name in RESNETS and name in list_models() else {}


def _download(weights: str, known: Mapping[str, Any], others: Mapping[str, str]) -> Mapping[str, Tensor]:
    url = known[weights].url if weights in known else others[weights]
    try:
        if weights in known:
            return known[weights].get_state_dict(progress=False, check_hash=True)
        return load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: the file does not have its hash
        raise ArgumentError(
            "backbone.weights", f"={weights}: cannot download {url} ({error}); download it elsewhere and give the file"
        ) from None


def with_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with mean 0 and variance 1 for BatchNorms that are stored as a scale and a shift only.

    A state in which any BatchNorm has statistics is returned unchanged.

    Args:
        state: a ResNet's parameters by torchvision's names, possibly with a prefix.
    """
    state = dict(state)
    if any(name.endswith("running_var") for name in state):
        return state
    eps = FrozenBatchNorm2d(1).eps
    for name in list(state):
        if re.search(r"(^|\.)(bn\d|downsample\.1)\.weight$", name):
            norm, shape = name.removesuffix("weight"), state[name].shape
            state[f"{norm}running_mean"] = torch.zeros(shape)
            # In float32, adding eps gives exactly 1.
            state[f"{norm}running_var"] = torch.full(shape, 1.0 - eps)
    return state


def check_pixel_range(
    source: str, weight: Tensor, scale: Tensor, variance: Tensor | None, input_format: InputFormat
) -> None:
    """Refuse an input format whose pixel range (0..255 or normalized) is not the one that the weights were trained on.

    The two ranges differ by a factor of 58, so the rough estimate of :func:`trained_deviation` is enough.

    Args:
        source: the weight file or name, for messages.
        weight: (C, 3, kh, kw), weight of the first convolution.
        scale: (C,), weight of its BatchNorm.
        variance: (C,), running variance of that BatchNorm, or None if it is merged into ``scale``.
        input_format: the format that the network will receive.

    Raises:
        ArgumentError: the ranges differ.
    """
    trained = trained_deviation(weight, scale, variance)
    if trained is None:
        return
    given = _STD / input_format.scale / (sum(input_format.std) / len(input_format.std))
    if not 1 / _TOLERANCE < trained / given < _TOLERANCE:
        raise ArgumentError(
            "backbone.weights",
            f"={source}: trained on pixels with a standard deviation of about {trained:.2g}, but backbone.input_format "
            f"gives {given:.2g}; weights for 0..255 need backbone.input_format=caffe, weights for normalized pixels "
            "rgb or timm; set backbone.check_weights=false for unusual weights",
        )


def trained_deviation(weight: Tensor, scale: Tensor, variance: Tensor | None) -> float | None:
    """An estimate of the standard deviation of the pixels that a network was trained on.

    It is the standard deviation of the first layer's outputs in training, divided by the norm of its filters.

    Args:
        weight: (C, 3, kh, kw), weight of the first convolution.
        scale: (C,), weight of its BatchNorm.
        variance: (C,), running variance of that BatchNorm, or None if it is merged into ``scale``.

    Returns:
        The estimate; None if all filters are zero.
    """
    norms = weight.float().flatten(1).norm(dim=1)
    spread = variance.float().sqrt() if variance is not None else _TYPICAL_SPREAD / scale.float().abs().clamp(min=1e-12)
    active = (norms > 1e-6) & (scale.float().abs() > 1e-6)
    return (spread / norms)[active].median().item() if active.any() else None


def _from_caffe2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename from Caffe2's names (``res2_0_branch2a_bn_s``) to torchvision's; unknown names are kept."""
    ours = {}
    for name, value in state.items():
        kind = {"w": "weight", "s": "weight", "b": "bias"}.get(name.rpartition("_")[2], "")
        if match := re.fullmatch(r"res(\d)_(\d+)_(branch\w+?)_(bn_)?[wsb]", name):
            stage, block, branch, norm = match.groups()
            layer = (_CAFFE2_NORMS if norm else _CAFFE2_LAYERS).get(branch, branch)
            name = f"layer{int(stage) - 1}.{block}.{layer}.{kind}"
        elif re.fullmatch(r"res_conv1_bn_[sb]", name):
            name = f"bn1.{kind}"
        elif re.fullmatch(r"(fc1000|pred)_[wb]", name):
            name = f"fc.{kind}"
        elif re.fullmatch(r"conv1_[wb]", name):
            name = f"conv1.{kind}"
        elif name.endswith("_momentum") or name in ("lr", "weight_order"):  # state of Caffe2's solver
            continue
        ours[name] = value
    stem = [ours.get(name) for name in ("conv1.bias", "bn1.bias", "bn1.weight")]
    if all(x is not None and x.shape == stem[0].shape for x in stem):  # type: ignore[union-attr]
        # Caffe2's stem convolution has a bias; add it to its BatchNorm's shift.
        shift, bias, scale = stem
        ours["bn1.bias"] = bias + scale * shift  # type: ignore[operator]
        del ours["conv1.bias"]
    return ours


def _from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename from detectron2's names (``res2.0.conv1.norm.weight``) to torchvision's."""
    ours = {}
    for name, value in state.items():
        name = name.removeprefix("stem.")
        name = re.sub(r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}.", name)
        name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
        name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        ours[name] = value
    return ours
