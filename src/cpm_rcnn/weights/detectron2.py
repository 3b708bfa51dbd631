"""Faster R-CNN and Cascade R-CNN with FPN from detectron2 (its model zoo's ``.pkl``, or a ``.pth`` of a training).

Names, shapes and the values below are those of detectron2 0.6 and its model zoo. Boxes are continuous, anchors are
centered on the corners of the cells, RoIAlign shifts by half a pixel and chooses its number of samples adaptively, and
the background is the last class.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from cpm_rcnn.errors import UserError
from cpm_rcnn.models.backbones.input_format import InputFormat
from cpm_rcnn.weights.detector_files import (
    CAFFE2_X101,
    MSRA,
    X101_32X8D,
    ConvertedDetector,
    DetectorFile,
    Rule,
    TensorSource,
    cascade_stages,
    convert_tensors,
    count,
    describe_format,
    ignored_parts,
    layout_of,
    model_settings,
    rename,
    resnet_options,
    weight_shape,
)
from cpm_rcnn.weights.detector_files import (
    input_format as chosen_format,
)

# The coder weights of the three stages of a Cascade R-CNN.
_CASCADE_WEIGHTS = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
_IGNORED = {
    r"roi_heads\.mask_": "mask head",
    r"roi_heads\.keypoint_": "keypoint head",
    r"sem_seg_head\.": "semantic segmentation head",
}
# Constants that older files contain.
_CONSTANTS = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.")

_BODY: list[Rule] = [
    (r"backbone\.body\.stem\.conv1", "backbone.bottom_up.stem.conv1"),
    (r"backbone\.body\.stem\.bn1", "backbone.bottom_up.stem.conv1.norm"),
    (
        r"backbone\.body\.layers\.(\d)\.(\d+)\.bn(\d)",
        lambda m: f"backbone.bottom_up.res{int(m[1]) + 2}.{m[2]}.conv{m[3]}.norm",
    ),
    (
        r"backbone\.body\.layers\.(\d)\.(\d+)\.downsample\.0",
        lambda m: f"backbone.bottom_up.res{int(m[1]) + 2}.{m[2]}.shortcut",
    ),
    (
        r"backbone\.body\.layers\.(\d)\.(\d+)\.downsample\.1",
        lambda m: f"backbone.bottom_up.res{int(m[1]) + 2}.{m[2]}.shortcut.norm",
    ),
    (r"backbone\.body\.layers\.(\d)", lambda m: f"backbone.bottom_up.res{int(m[1]) + 2}"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0", lambda m: f"backbone.fpn_output{int(m[1]) + 2}"),
    (r"rpn\.head\.conv\.0\.0", "proposal_generator.rpn_head.conv"),
    (r"rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    (r"rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
]
_HEAD: dict[str, list[Rule]] = {
    "faster": [
        (r"head\.stages\.0\.classifier\.mlp\.fc6", "roi_heads.box_head.fc1"),
        (r"head\.stages\.0\.classifier\.mlp\.fc7", "roi_heads.box_head.fc2"),
        (r"head\.stages\.0\.classifier\.predictor", "roi_heads.box_predictor.cls_score"),
        (r"head\.stages\.0\.regressor", "roi_heads.box_predictor.bbox_pred"),
    ],
    "cascade": [
        (r"head\.stages\.(\d)\.classifier\.mlp\.fc6", r"roi_heads.box_head.\1.fc1"),
        (r"head\.stages\.(\d)\.classifier\.mlp\.fc7", r"roi_heads.box_head.\1.fc2"),
        (r"head\.stages\.(\d)\.classifier\.predictor", r"roi_heads.box_predictor.\1.cls_score"),
        (r"head\.stages\.(\d)\.regressor", r"roi_heads.box_predictor.\1.bbox_pred"),
    ],
}


def recognizes(names: Collection[str]) -> bool:
    """Whether a file with these parameter names comes from detectron2."""
    return any(name.startswith(("backbone.bottom_up.", "proposal_generator.")) for name in names)


def read(file: DetectorFile, input_format: Any = None, **overrides: Any) -> ConvertedDetector:
    """The detector of a file of detectron2.

    Args:
        file: content of the file.
        input_format: replaces the model zoo's input format: ``caffe`` (MSRA), ``rgb``, or a mapping.
        **overrides: options that replace those derived from the file.

    Raises:
        ArgumentError: an override is invalid.
        UserError: the file is damaged or contains another kind of model.
    """
    constants = {name: value for name, value in file.state.items() if name.startswith(_CONSTANTS)}
    state = {name: value for name, value in file.state.items() if name not in constants}
    state, ignored = ignored_parts(_with_statistics(state), _IGNORED)
    options, num_classes = _options(state, file.source)
    automatic = _format(options["backbone"], constants)
    options["backbone"]["input_format"] = chosen_format(input_format, automatic)
    settings = model_settings(options, overrides, file.source)

    def source_of(name: str) -> TensorSource:
        theirs = rename(name, [*_BODY, *_HEAD[settings.trunk.head]])
        assert theirs is not None, f"{name} has no name in detectron2"
        return TensorSource((theirs,), background_last="cls_score" in theirs)

    converted = convert_tensors(state, settings, num_classes, source_of, file.source)
    kind = {"faster": "Faster R-CNN", "cascade": "Cascade R-CNN"}[settings.trunk.head]
    notes = [f"input: {describe_format(settings.backbone.resolved_format)}"]
    notes += [f"the {part} of the file is not used" for part in ignored]
    categories = COCO_CATEGORIES if num_classes == len(COCO_CATEGORIES) else None
    description = f"detectron2 {kind}, {settings.backbone.name}, {num_classes} classes"
    return ConvertedDetector(settings, num_classes, converted, categories, description, tuple(notes))


def _options(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Any], int]:
    """The arguments of ``ModelSettings.from_options``, and the number of classes."""
    stages = count(state, r"roi_heads\.box_predictor\.(\d)\.")
    box_head = "roi_heads.box_head.0." if stages else "roi_heads.box_head."
    predictor = "roi_heads.box_predictor.0." if stages else "roi_heads.box_predictor."
    other = f"{source}: not a Faster or Cascade R-CNN with FPN of detectron2"
    backbone = resnet_options(state, [f"backbone.bottom_up.res{stage}." for stage in (2, 3, 4, 5)], other)
    options: dict[str, Any] = {
        "backbone": backbone,
        "head": "cascade" if stages else "faster",
        "convention": "detectron2",
        "fpn_channels": weight_shape(state, "backbone.fpn_lateral2.weight", other)[0],
        "mlp_channels": weight_shape(state, f"{box_head}fc1.weight", other)[0],
        "score_threshold": 0.05,
        "nms_iou": 0.5,
        "max_detections": 100,
    }
    if stages:
        if stages != len(_CASCADE_WEIGHTS):
            raise UserError(f"{source}: a cascade of {stages} stages; detectron2's Cascade R-CNN has 3")
        options["stages"] = cascade_stages(_CASCADE_WEIGHTS)
        options["score_average"] = "probabilities"
    return options, weight_shape(state, f"{predictor}cls_score.weight", other)[0] - 1


def _format(backbone: Mapping[str, Any], constants: Mapping[str, Tensor]) -> InputFormat:
    """The input format: the file's pixel mean and std if it has them, otherwise those of the model zoo."""
    layout = layout_of(backbone)
    automatic = CAFFE2_X101 if layout == X101_32X8D else MSRA
    mean, std = (constants.get(name, torch.empty(0)).flatten().tolist() for name in ("pixel_mean", "pixel_std"))
    if len(mean) != 3 or len(std) != 3:
        return automatic
    # The blue channel of ImageNet is darker than the red one. Only weights trained with Caffe read BGR.
    rgb = mean[0] > mean[2]
    stride_in_1x1 = not rgb and layout.can_stride_in_1x1
    mean, std = ([round(x, 4) for x in values] for values in (mean, std))
    return replace(automatic, order="rgb" if rgb else "bgr", mean=mean, std=std, stride_in_1x1=stride_in_1x1)


def _with_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with neutral statistics if it stores every BatchNorm as a scale and a shift."""
    state = dict(state)
    if not any(name.endswith(".running_var") for name in state):
        for name in [name for name in state if re.search(r"bottom_up\..*\.norm\.weight$", name)]:
            norm = name.removesuffix("weight")
            state[f"{norm}running_mean"] = torch.zeros(state[name].shape)
            state[f"{norm}running_var"] = torch.ones(state[name].shape)
    return state
