"""torchvision's ``fasterrcnn_resnet50_fpn`` and models like it, as a file or downloaded by torchvision.

Anchors are centered on the corners of the cells and rounded to whole pixels, RoIAlign takes two samples per bin side
and does not shift, and the background is the first class. The weights ``COCO_V1`` are used with an epsilon of 0 in
their BatchNorms. They number their classes by COCO's ids, so ten of the 90 classes do not exist in COCO's data
(``N/A`` in torchvision). These are kept, because they take part in the softmax.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from cpm_rcnn.errors import UserError, check_range
from cpm_rcnn.models.backbones.input_format import RGB
from cpm_rcnn.weights.detector_files import (
    ConvertedDetector,
    DetectorFile,
    Rule,
    TensorSource,
    convert_tensors,
    describe_format,
    ignored_parts,
    model_settings,
    rename,
    resnet_options,
    weight_shape,
)
from cpm_rcnn.weights.detector_files import (
    input_format as chosen_format,
)

_DOWNLOADS = "torchvision:"
# The epsilon of BatchNorm in torchvision and in this project.
_EPSILON = FrozenBatchNorm2d(1).eps
_IGNORED = {r"roi_heads\.mask_": "mask head", r"roi_heads\.keypoint_": "keypoint head"}
# Ids 1..90; COCO uses 80 of them.
_SLOTS = 90

_NAMES: list[Rule] = [
    (r"backbone\.body\.stem", "backbone.body"),
    (r"backbone\.body\.layers\.(\d)", lambda m: f"backbone.body.layer{int(m[1]) + 1}"),
    (r"backbone\.fpn", "backbone.fpn"),
    (r"rpn", "rpn"),
    (r"head\.stages\.0\.classifier\.mlp", "roi_heads.box_head"),
    (r"head\.stages\.0\.classifier\.predictor", "roi_heads.box_predictor.cls_score"),
    (r"head\.stages\.0\.regressor", "roi_heads.box_predictor.bbox_pred"),
]


def downloads(source: Any) -> bool:
    """Whether ``source`` names weights of torchvision instead of a file."""
    return isinstance(source, str) and source.startswith(_DOWNLOADS)


def download(name: str, source: str) -> dict[str, Tensor]:
    """The weights that ``torchvision:NAME`` means, downloaded or from torchvision's cache.

    Args:
        name: ``torchvision:`` and the weights' name: ``fasterrcnn_resnet50_fpn``, ``COCO_V1``, or torchvision's
            ``FasterRCNN_ResNet50_FPN_Weights.COCO_V1``.
        source: the argument, for messages.

    Raises:
        UserError: the name is unknown, or the file cannot be downloaded.
    """
    weights = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    known = ("fasterrcnn_resnet50_fpn", str(weights), weights.name)
    if name.removeprefix(_DOWNLOADS) not in known:
        raise UserError(f"{source}: must be a file or one of {', '.join(_DOWNLOADS + each for each in known)}")
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{source}: cannot download {weights.url} ({str(error).splitlines()[0]}); download it elsewhere and give "
            "the file"
        ) from None


def recognizes(names: Collection[str]) -> bool:
    """Whether a file with these parameter names comes from torchvision."""
    return any(name.startswith(("backbone.body.", "rpn.head.")) for name in names)


def read(
    file: DetectorFile, input_format: Any = None, norm_epsilon: float | None = None, **overrides: Any
) -> ConvertedDetector:
    """The detector of a file of torchvision.

    Args:
        file: content of the file.
        input_format: replaces torchvision's input format.
        norm_epsilon: epsilon of the BatchNorms. None: 1e-5 if they were not frozen, and otherwise 0, as in models that
            start from ``COCO_V1``.
        **overrides: options that replace those derived from the file.

    Raises:
        ArgumentError: an override is invalid.
        UserError: the file is damaged or contains another kind of model.
    """
    state, ignored = ignored_parts({_current_name(name): value for name, value in file.state.items()}, _IGNORED)
    if any(re.match(r"backbone\.fpn\.\w+_blocks\.\d\.1\.|roi_heads\.box_head\.\d\.", name) for name in state):
        raise UserError(
            f"{file.source}: a fasterrcnn_resnet50_fpn_v2 of torchvision, which has BatchNorm outside its backbone; "
            "only fasterrcnn_resnet50_fpn can be converted"
        )
    options, num_classes = _options(state, file.source)
    options["backbone"]["input_format"] = chosen_format(input_format, RGB)
    settings = model_settings(options, overrides, file.source)

    def source_of(name: str) -> TensorSource:
        theirs = rename(name, _NAMES)
        assert theirs is not None, f"{name} has no name in torchvision"
        return TensorSource((theirs,), dropped_rows=4 if "bbox_pred" in theirs and "roi_heads" in theirs else 0)

    converted = convert_tensors(state, settings, num_classes, source_of, file.source)
    notes = [f"input: {describe_format(settings.backbone.resolved_format)}"]
    if norm_epsilon is None:
        # Only BatchNorms that were not frozen store a counter. Models that were trained from ImageNet weights have
        # frozen ones with an epsilon of 1e-5, and cannot be told apart from those that were trained from COCO_V1.
        counters = any(name.endswith("num_batches_tracked") for name in state)
        norm_epsilon = _EPSILON if counters else 0.0
        assumed = "assumed; set backbone.norm_epsilon=1e-5 if the model started from ImageNet weights"
        notes.append("BatchNorm epsilon: " + (f"{_EPSILON:g}" if counters else f"0 ({assumed})"))
    check_range("backbone.norm_epsilon", norm_epsilon, 0, 1)
    if norm_epsilon != _EPSILON:
        converted = _with_epsilon(converted, norm_epsilon, file.source)
    notes += [f"the {part} of the file is not used" for part in ignored]
    categories = _categories() if num_classes == _SLOTS else None
    if categories:
        notes.append(f"{_SLOTS - len(COCO_CATEGORIES)} of the classes are not in COCO's data (N/A)")
    description = f"torchvision Faster R-CNN, {settings.backbone.name}, {num_classes} classes"
    return ConvertedDetector(settings, num_classes, converted, categories, description, tuple(notes))


def _current_name(name: str) -> str:
    """A name as torchvision writes it since 0.14; its published files are older."""
    name = re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", name)
    return re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", name)


def _options(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Any], int]:
    """The arguments of ``ModelSettings.from_options``, and the number of classes."""
    other = f"{source}: not a Faster R-CNN with ResNet and FPN of torchvision"
    options = {
        "backbone": resnet_options(state, [f"backbone.body.layer{stage}." for stage in (1, 2, 3, 4)], other),
        "head": "faster",
        "convention": "torchvision",
        "fpn_channels": weight_shape(state, "backbone.fpn.inner_blocks.0.0.weight", other)[0],
        "mlp_channels": weight_shape(state, "roi_heads.box_head.fc6.weight", other)[0],
        "score_threshold": 0.05,
        "nms_iou": 0.5,
        "max_detections": 100,
    }
    return options, weight_shape(state, "roi_heads.box_predictor.cls_score.weight", other)[0] - 1


def _with_epsilon(state: Mapping[str, Tensor], epsilon: float, source: str) -> dict[str, Tensor]:
    """``state`` with all BatchNorms merged into scale and shift, computed with ``epsilon``.

    Changing the variances by the difference to this project's epsilon instead would lose the precision of small ones.
    """
    state = dict(state)
    for name in [name for name in state if name.endswith(".running_var")]:
        norm = name.removesuffix("running_var")
        weight, bias, mean, variance = (
            state[f"{norm}{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (variance + epsilon).sqrt()
        if not scale.isfinite().all():
            raise UserError(f"{source}: {rename(name, _NAMES)} has values that are not positive")
        state[f"{norm}weight"], state[f"{norm}bias"] = scale.float(), (bias - mean * scale).float()
        state[f"{norm}running_mean"] = torch.zeros_like(state[name])
        # In float32, adding the epsilon gives exactly 1.
        state[name] = torch.full_like(state[name], 1.0 - _EPSILON)
    return state


def _categories() -> list[dict[str, Any]]:
    """COCO's categories, and one named N/A for each id that it does not use."""
    names = {category["id"]: category["name"] for category in COCO_CATEGORIES}
    return [{"id": key, "name": names.get(key, f"N/A {key}")} for key in range(1, _SLOTS + 1)]
