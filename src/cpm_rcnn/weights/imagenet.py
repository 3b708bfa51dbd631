"""ImageNet weights of many origins: their names, and what images they were trained on (spec sections 2 and 10)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.errors import UserError, check_file
from cpm_rcnn.weights.files import read_weights

# Of ImageNet's photographs in 0..255: mean of R, G, B, and standard deviation.
_MEAN = (123.675, 116.28, 103.53)
_STD = 57.6
# Filters pass some frequencies and stop others, so what a layer's statistics say of its input is rough; but 0..255 and
# normalised pixels differ by a factor of 58, and this is about the root of it.
_TOLERANCE = 8.0
_MEAN_TOLERANCE = 5.0
_STD_TOLERANCE = 1.2
_RANGE_BORDER = 8.0
# Where BatchNorm is merged, its outputs' spread is not told; of the first layers of ResNets it is a fraction of one.
_TYPICAL_SPREAD = 0.3

_CAFFE2_LAYERS = {"branch1": "downsample.0", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_CAFFE2_NORMS = {"branch1": "downsample.1", "branch2a": "bn1", "branch2b": "bn2", "branch2c": "bn3"}


class Origin(NamedTuple):
    """What a file's names tell.

    Attributes:
        caffe2: named by Caffe2 (Detectron's model zoo, detectron2's MSRA files), which reads images as BGR.
        merged: BatchNorm came as a scale and a shift, without statistics.
    """

    caffe2: bool
    merged: bool


def resnet_weights(name: str, weights: str) -> tuple[dict[str, Tensor], Origin]:
    """ImageNet weights of a ResNet under torchvision's names, without the classifier.

    Args:
        name: torchvision's name of the network, or ``resnet`` where it has none.
        weights: torchvision's weight name, or a local file: torchvision's, timm's or the CPM R-CNN release's ``.pth``
            (the same names), detectron2's or Caffe2's ``.pkl``.

    Raises:
        UserError: unknown weights, no such file, or a damaged one.
    """
    known = {} if name == "resnet" else get_model_weights(name).__members__
    if weights in known:
        try:
            state = known[weights].get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            raise UserError(
                f"backbone.weights={weights}: cannot fetch {known[weights].url} ({error}); "
                "download it elsewhere and give the file"
            ) from None
    else:
        check_file("backbone.weights", weights, ", ".join(["null", *known, "a local file"]))
        state = read_weights(weights, "backbone.weights")
    caffe2 = "conv1_w" in state
    if caffe2:
        state = _from_caffe2(state)
    elif "stem.conv1.weight" in state:
        state = _from_detectron2(state)
    state = {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    merged = "bn1.running_var" not in state
    return with_statistics(state), Origin(caffe2, merged)


def with_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with statistics that change nothing, where its BatchNorms are merged: a scale and a shift alone.

    A state in which any BatchNorm has statistics is given back as it is.

    Args:
        state: of a ResNet, under torchvision's names or with a prefix before them.
    """
    state = dict(state)
    if any(name.endswith("running_var") for name in state):
        return state
    eps = FrozenBatchNorm2d(1).eps
    for name in list(state):
        if re.search(r"(^|\.)(bn\d|downsample\.1)\.weight$", name):
            norm, shape = name.removesuffix("weight"), state[name].shape
            state[f"{norm}running_mean"] = torch.zeros(shape)
            # In float32 this plus eps is 1 again, to the last bit.
            state[f"{norm}running_var"] = torch.full(shape, 1.0 - eps)
    return state


def check_input_format(
    source: str, state: Mapping[str, Tensor], origin: Origin, pixel_format: Mapping[str, Any], stride_in_1x1: bool
) -> None:
    """Refuse to feed a ResNet images unlike those that its weights were trained on.

    The range that the first layer was trained on is estimated (:func:`check_range_of_pixels`). Weights for 0..255 are
    Caffe's: BGR, in a ResNet (not a ResNeXt) with the stride on the first 1x1. Others are RGB with the stride on the
    3x3, but for Caffe2's normalised ResNeXt, which is BGR.

    Args:
        source: the file or weight name, for messages.
        state: under torchvision's names.
        origin: what the file's names told.
        pixel_format: arguments of :class:`~cpm_rcnn.models.preprocess.ImagePreprocessor` but ``pixels``.
        stride_in_1x1: where the network has a bottleneck's stride.

    Raises:
        UserError: pixel range, channel order, mean or stride placement is not the file's.
    """
    variance = None if origin.merged else state["bn1.running_var"]
    check_range_of_pixels(source, state["conv1.weight"], state["bn1.weight"], variance, pixel_format)
    wide = _spread(pixel_format) > _RANGE_BORDER
    order = "bgr" if wide or origin.caffe2 else "rgb"
    if pixel_format["order"] != order:
        raise UserError(_mismatch(source, f"{order.upper()} images", "backbone.pixel_format.order", order))
    mean = [value * pixel_format["scale"] for value in pixel_format["mean"]]
    expected = _MEAN if order == "rgb" else _MEAN[::-1]
    scaled = [round(value / pixel_format["scale"], 4) for value in expected]
    if max(abs(a - b) for a, b in zip(mean, expected)) > _MEAN_TOLERANCE:
        raise UserError(
            _mismatch(source, f"a mean of about {scaled} ({order.upper()})", "backbone.pixel_format.mean", scaled)
        )
    std = [value * pixel_format["scale"] for value in pixel_format["std"]]
    if max(std) / (1 if wide else _STD) > _STD_TOLERANCE or min(std) / (1 if wide else _STD) < 1 / _STD_TOLERANCE:
        value = [1, 1, 1] if wide else [round(_STD / pixel_format["scale"], 3)] * 3
        raise UserError(_mismatch(source, f"a std of about {value}", "backbone.pixel_format.std", value))
    bottleneck = "layer1.0.conv3.weight" in state
    grouped = state["layer1.0.conv2.weight"].shape[1] < state["layer1.0.conv2.weight"].shape[0]
    caffe_style = wide and not grouped
    if bottleneck and stride_in_1x1 != caffe_style:
        place = "the first 1x1 (Caffe style)" if caffe_style else "the 3x3"
        raise UserError(_mismatch(source, f"the stride on {place}", "backbone.stride_in_1x1", str(caffe_style).lower()))


def check_range_of_pixels(
    source: str, weight: Tensor, scale: Tensor, variance: Tensor | None, pixel_format: Mapping[str, Any]
) -> None:
    """Refuse pixels of another range than the first layer of a network was trained on.

    How far the layer's outputs varied in training, over the norm of its filters, tells how far its inputs varied.

    Args:
        source: the file or weight name, for messages.
        weight: (C, 3, kh, kw) of the first convolution.
        scale: (C,) of its BatchNorm.
        variance: (C,) running variance of that BatchNorm, or None where it is merged into ``scale``.
        pixel_format: see :func:`check_input_format`.

    Raises:
        UserError: the range is another.
    """
    norms = weight.float().flatten(1).norm(dim=1)
    varied = variance.float().sqrt() if variance is not None else _TYPICAL_SPREAD / scale.float().abs().clamp(min=1e-12)
    alive = (norms > 1e-6) & (scale.float().abs() > 1e-6)
    if not alive.any():
        return
    trained = (varied / norms)[alive].median().item()
    given = _spread(pixel_format)
    if not 1 / _TOLERANCE < trained / given < _TOLERANCE:
        raise UserError(
            f"backbone.weights={source}: trained on pixels that vary by about {trained:.2g}, but backbone.pixel_format "
            f"makes them vary by {given:.2g}; weights for 0..255 (Caffe style) want backbone=r50_caffe or the like, "
            "weights unlike the published ones +backbone.check_weights=false"
        )


def _spread(pixel_format: Mapping[str, Any]) -> float:
    """Standard deviation of photographs in a pixel format."""
    stds: Sequence[float] = pixel_format["std"]
    return _STD / pixel_format["scale"] / (sum(stds) / len(stds))


def _mismatch(source: str, wants: str, key: str, value: Any) -> str:
    return (
        f"backbone.weights={source}: belongs to {wants}; set {key}={value} "
        "(or +backbone.check_weights=false for weights unlike the published ones)"
    )


def _from_caffe2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's names for Caffe2's (``res2_0_branch2a_bn_s``); what is not known keeps its own."""
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
        elif name.endswith("_momentum") or name in ("lr", "weight_order"):  # of Caffe2's solver
            continue
        ours[name] = value
    stem = [ours.get(name) for name in ("conv1.bias", "bn1.bias", "bn1.weight")]
    if all(x is not None and x.shape == stem[0].shape for x in stem):  # type: ignore[union-attr]
        # The stem's convolution has a bias there; its BatchNorm can carry it.
        shift, bias, scale = stem
        ours["bn1.bias"] = bias + scale * shift  # type: ignore[operator]
        del ours["conv1.bias"]
    return ours


def _from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's names for detectron2's (``res2.0.conv1.norm.weight``)."""
    ours = {}
    for name, value in state.items():
        name = name.removeprefix("stem.")
        name = re.sub(r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}.", name)
        name = re.sub(r"conv(\d)\.norm\.", r"bn\1.", name)
        name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        ours[name] = value
    return ours
