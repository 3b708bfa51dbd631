"""What the readers of other programs' detector files share: the result of a reader, names, shapes and values."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.models.backbones.input_format import RGB, InputFormat
from cpm_rcnn.models.backbones.resnet import RESNETS, ResNetLayout
from cpm_rcnn.models.build import build
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.weights.imagenet import with_statistics
from cpm_rcnn.weights.reading import check_names

# Input formats of the ImageNet weights that detectron2 and mmdetection start from.
MSRA = InputFormat("bgr", 1, (103.53, 116.28, 123.675), (1, 1, 1), stride_in_1x1=True)
CAFFE2_X101 = InputFormat("bgr", 1, (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))
# The layout of the X-101-32x8d, whose ImageNet weights were trained with Caffe2.
X101_32X8D = ResNetLayout((3, 4, 23, 3), groups=32, width_per_group=8)
# Larger values are those of a damaged file: inverting the highest bit of a float's exponent multiplies it by 2^128.
_LARGEST = 1e12
_LISTED = 6

# How many grid points send features to each point; the senders of each receiver are numbered.
_SENDERS = (2, 3, 2, 3, 4, 3, 2, 3, 2)

# A pattern for the beginning of a parameter name of this project, and what another program calls it.
Rule = tuple[str, str | Callable[[re.Match[str]], str]]


class DetectorFile(NamedTuple):
    """The content of a detector's weight file.

    Attributes:
        state: tensors by name.
        meta: what the file stores under ``meta``; None if it has no such entry.
        source: the argument and file, for messages.
    """

    state: dict[str, Tensor]
    meta: Any
    source: str


@dataclass(frozen=True)
class ConvertedDetector:
    """A detector of another program, as this project's model.

    Attributes:
        settings: settings of the model.
        num_classes: number of foreground classes.
        state: weights by this project's names.
        categories: ``id`` and ``name`` of the classes 1..C; None if the file does not tell them.
        description: what was found, in one line.
        notes: what the user should know about the file, one line each.
    """

    settings: ModelSettings
    num_classes: int
    state: dict[str, Tensor]
    categories: list[dict[str, Any]] | None
    description: str
    notes: tuple[str, ...] = ()

    @property
    def num_values(self) -> int:
        """The number of weights, without the statistics of BatchNorms."""
        return sum(value.numel() for name, value in self.state.items() if ".running_" not in name)


@dataclass(frozen=True)
class TensorSource:
    """Where a parameter of this project comes from.

    Attributes:
        names: the tensors whose concatenation along the first dimension is the parameter.
        dropped_rows: number of first rows that this project does not have.
        background_last: whether the last row is the background class, which is the first here.
    """

    names: tuple[str, ...]
    dropped_rows: int = 0
    background_last: bool = False

    def shape(self, ours: torch.Size) -> torch.Size:
        """The shape of each of the tensors if that of the parameter is ``ours``."""
        return torch.Size([ours[0] // len(self.names) + self.dropped_rows, *ours[1:]]) if ours else ours

    def value(self, state: Mapping[str, Tensor]) -> Tensor:
        """The parameter, from tensors by name."""
        parts = [state[name] for name in self.names]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.dropped_rows:
            value = value[self.dropped_rows :]
        # Copied, because a part of a tensor would be stored with the whole tensor.
        return value.roll(1, 0) if self.background_last else value.clone() if self.dropped_rows else value


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the first group of ``pattern`` matches; 0 without a match.

    Gaps show when names are compared.
    """
    return max((int(m[1]) + 1 for m in (re.match(pattern, name) for name in state) if m), default=0)


def resnet_options(state: Mapping[str, Tensor], prefixes: Sequence[str], source: str) -> dict[str, Any]:
    """The backbone settings of a ResNet or ResNeXt, from names and shapes, without its input format.

    Args:
        state: tensors by name.
        prefixes: the prefixes of the names in C2, C3, C4 and C5, which the number of the block follows.
        source: where the tensors came from, for messages.

    Raises:
        UserError: the first block is missing.
    """
    blocks = [count(state, rf"{re.escape(prefix)}(\d+)\.") for prefix in prefixes]
    bottleneck = any(re.match(rf"{re.escape(prefix)}\d+\.conv3\.", name) for prefix in prefixes for name in state)
    width, channels = weight_shape(state, f"{prefixes[0]}0.conv2.weight", source)[:2]
    # Impossible sizes are replaced by valid ones; the comparison of names reports them later.
    sizes = {"groups": max(width // max(channels, 1), 1), "width_per_group": max(channels, 1)} if bottleneck else {}
    layout = ResNetLayout(tuple(max(n, 1) for n in blocks), bottleneck=bottleneck, **sizes)
    name = next((name for name, known in RESNETS.items() if known == layout), "resnet")
    deformable = [
        stage + 2 for stage, prefix in enumerate(prefixes) if _has(state, rf"{prefix}\d+\.conv2\.conv_offset")
    ]
    options = {"name": name, "weights": None, "frozen_stages": 2, "deformable_stages": deformable}
    return options | ({"layout": layout} if name == "resnet" else {})


def layout_of(backbone: Mapping[str, Any]) -> ResNetLayout:
    """The layout of the backbone settings that :func:`resnet_options` returns."""
    return backbone["layout"] if backbone["name"] == "resnet" else RESNETS[backbone["name"]]


def weight_shape(state: Mapping[str, Tensor], name: str, source: str) -> torch.Size:
    """The shape of a weight that determines the architecture.

    Raises:
        UserError: it is missing or has fewer than two dimensions.
    """
    if name not in state or state[name].ndim < 2:
        raise UserError(f"{source}: {name} is missing")
    return state[name].shape


def cascade_stages(coder_weights: Collection[Collection[float]]) -> list[dict[str, Any]]:
    """The stage settings of a Cascade R-CNN, whose IoU thresholds and loss weights are the paper's."""
    values = zip((0.5, 0.6, 0.7), coder_weights, (1.0, 0.5, 0.25), strict=True)
    return [
        {"positive_iou": iou, "coder_weights": [float(w) for w in weights], "loss_weight": loss}
        for iou, weights, loss in values
    ]


def ignored_parts(state: Mapping[str, Tensor], parts: Mapping[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """Drop the parts of a model that have no influence on its boxes and scores.

    Args:
        state: tensors by name.
        parts: what to call a part, by a pattern for the beginning of its names.

    Returns:
        The remaining tensors, and the names of the parts that were found.
    """
    found = [part for pattern, part in parts.items() if _has(state, pattern)]
    return {name: value for name, value in state.items() if not any(re.match(p, name) for p in parts)}, found


def _has(state: Mapping[str, Tensor], pattern: str) -> bool:
    return any(re.match(pattern, name) for name in state)


def input_format(override: Any, automatic: InputFormat) -> Any:
    """The option ``input_format`` of the backbone.

    Args:
        override: what the user has set: None, ``rgb``, ``caffe``, or a mapping. ``caffe`` is the format of MSRA's
            weights as detectron2 distributes them.
        automatic: the format without an override.
    """
    named = {None: automatic, "rgb": RGB, "caffe": MSRA}
    return named[override] if override is None or (isinstance(override, str) and override in named) else override


def describe_format(value: InputFormat) -> str:
    """An input format in a few words, for the output of ``convert``."""
    mean, std = (", ".join(f"{x * value.scale:g}" for x in values) for values in (value.mean, value.std))
    numbers = f"mean {mean}, std {std} of 0..255"
    stride = "1x1" if value.stride_in_1x1 else "3x3"
    return f"{value.order.upper()}, {numbers}, stride in the {stride} convolutions"


def model_settings(derived: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> ModelSettings:
    """The settings of a model, of which some options were derived from a file.

    Args:
        derived: options from the file.
        overrides: options of the user, which take precedence.
        source: the argument and file, for messages.

    Raises:
        ArgumentError: an override is invalid.
        UserError: a derived option is invalid, because the file is damaged.
    """
    try:
        return ModelSettings.from_options(**{**derived, **overrides})
    except ArgumentError as error:
        first = re.split(r"[.\[=]", error.argument)[0]
        given = error.argument.startswith("backbone.input_format")  # only the user can give an invalid one
        if not given and first in derived.keys() - overrides.keys() - {"head"}:
            raise UserError(f"{source}: {error}") from None
        raise


def rename(name: str, rules: Sequence[Rule]) -> str | None:
    """``name`` with the beginning replaced that the first matching rule describes; None if none matches."""
    for pattern, theirs in rules:
        renamed, found = re.subn(rf"^{pattern}", theirs, name)
        if found:
            return renamed
    return None


def fusion_names(name: str, prefix: str) -> list[str]:
    """The names, in the release and in mmdetection, of the convolutions that one grouped convolution here computes.

    Args:
        name: this project's name of a parameter.
        prefix: their names up to the number of the receiving point, with ``{stage}`` and ``{order}``.

    Returns:
        Their names; empty if ``name`` is not a parameter of the feature fusion.
    """
    match = re.fullmatch(r"head\.stages\.(\d)\.fusion\.(f|s)\w+_order\.(\d)\.(weight|bias)", name)
    if not match:
        return []
    stage, order, layer, kind = match.groups()
    prefix = prefix.format(stage=stage, order=order)
    return [f"{prefix}.{point}.{i}.{layer}.{kind}" for point, many in enumerate(_SENDERS) for i in range(many)]


def convert_tensors(
    state: Mapping[str, Tensor],
    settings: ModelSettings,
    num_classes: int,
    source_of: Callable[[str], TensorSource],
    source: str,
) -> dict[str, Tensor]:
    """The tensors of a file by this project's names.

    Args:
        state: all tensors of the file that the model needs, by name. BatchNorms may be merged into scale and shift.
        settings: settings of the model.
        num_classes: number of foreground classes.
        source_of: where the parameter or buffer of a name comes from.
        source: the argument and file, for messages.

    Raises:
        UserError: names or shapes are missing, unexpected or wrong, or values are not finite or extremely large.
    """
    state = {name: value for name, value in with_statistics(state).items() if not name.endswith("num_batches_tracked")}
    check_values(state, source)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build(settings, num_classes).state_dict().items()}
    sources = {name: source_of(name) for name in shapes}
    wanted = {theirs: each.shape(shapes[name]) for name, each in sources.items() for theirs in each.names}
    check_names(source, state, wanted)
    return {name: each.value(state).float() for name, each in sources.items()}


def check_values(state: Mapping[str, Tensor], source: str) -> None:
    """Raise :class:`UserError` if values of ``state`` are not finite, or so large that the file must be damaged."""
    nonfinite = [name for name, value in state.items() if not value.isfinite().all()]
    large = [name for name, value in state.items() if value.numel() and value.abs().max() > _LARGEST]
    for what, names in (("non-finite", nonfinite), ("extremely large", large)):
        if names:
            listed = ", ".join(names[:_LISTED])
            raise UserError(f"{source}: {len(names)} of {len(state)} tensors have {what} values: {listed}")
