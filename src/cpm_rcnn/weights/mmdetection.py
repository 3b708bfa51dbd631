"""Faster, Cascade and Grid R-CNN with FPN from mmdetection 2.x and 3.x, whose parameter names are the same.

Names, shapes and the values below are those of mmdetection 3.3 and its model zoo. Boxes are continuous, anchors are
centered on the corners of the cells, RoIAlign shifts by half a pixel and chooses its number of samples adaptively, and
the background is the last class. What names cannot tell (the input format, for example) is read from the configuration
that files contain, :mod:`cpm_rcnn.weights.mmdetection_config`.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from cpm_rcnn.errors import UserError
from cpm_rcnn.models.backbones.input_format import RGB, InputFormat
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
    fusion_names,
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
from cpm_rcnn.weights.imagenet import trained_deviation
from cpm_rcnn.weights.mmdetection_config import MMDetectionConfig

# 1 / target_stds of the three stages of a Cascade R-CNN; the last differs a little from the paper's.
_CASCADE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
_FASTER_STDS = (0.1, 0.1, 0.2, 0.2)
_KINDS = {"faster": "Faster R-CNN", "cascade": "Cascade R-CNN", "cpm": "Grid R-CNN"}
_IGNORED = {r"roi_head\.mask_head\.": "mask head", r"roi_head\.mask_iou_head\.": "mask IoU head"}
# Standard deviation of the pixels between that of normalized ones, 1, and that of pixels in 0..255, about 58.
_RAW_PIXELS = 7.6

_BODY: list[Rule] = [
    (r"backbone\.body\.stem", "backbone"),
    (r"backbone\.body\.layers\.(\d)", lambda m: f"backbone.layer{int(m[1]) + 1}"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0", r"neck.lateral_convs.\1.conv"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0", r"neck.fpn_convs.\1.conv"),
    (r"rpn\.head\.conv\.0\.0", "rpn_head.rpn_conv"),
    (r"rpn\.head\.cls_logits", "rpn_head.rpn_cls"),
    (r"rpn\.head\.bbox_pred", "rpn_head.rpn_reg"),
]


def _box_head(ours: str, theirs: str) -> list[Rule]:
    return [
        (rf"{ours}classifier\.mlp\.fc6", f"{theirs}shared_fcs.0"),
        (rf"{ours}classifier\.mlp\.fc7", f"{theirs}shared_fcs.1"),
        (rf"{ours}classifier\.predictor", f"{theirs}fc_cls"),
        (rf"{ours}regressor", f"{theirs}fc_reg"),
    ]


_HEAD: dict[str, list[Rule]] = {
    "faster": _box_head(r"head\.stages\.0\.", "roi_head.bbox_head."),
    "cascade": _box_head(r"head\.stages\.(\d)\.", r"roi_head.bbox_head.\1."),
    "cpm": [
        *_box_head(r"head\.", "roi_head.bbox_head."),
        # Convolution, norm and ReLU are items of one sequence here.
        (
            r"head\.stages\.0\.convs\.(\d+)",
            lambda m: f"roi_head.grid_head.convs.{int(m[1]) // 3}.{('conv', 'gn')[int(m[1]) % 3]}",
        ),
        (r"head\.stages\.0\.deconvs\.0", "roi_head.grid_head.deconv1"),
        (r"head\.stages\.0\.deconvs\.1", "roi_head.grid_head.norm1"),
        (r"head\.stages\.0\.deconvs\.3", "roi_head.grid_head.deconv2"),
    ],
}


def recognizes(names: Collection[str]) -> bool:
    """Whether a file with these parameter names comes from mmdetection."""
    return any(name.startswith(("neck.", "rpn_head.", "roi_head.", "bbox_head.")) for name in names)


def read(file: DetectorFile, input_format: Any = None, **overrides: Any) -> ConvertedDetector:
    """The detector of a file of mmdetection.

    Args:
        file: content of the file.
        input_format: replaces the input format that the file's configuration states: ``rgb`` (style ``pytorch``),
            ``caffe``, or a mapping.
        **overrides: options that replace those derived from the file.

    Raises:
        ArgumentError: an override is invalid.
        UserError: the file is damaged or contains another kind of model.
    """
    state, ignored = ignored_parts(file.state, _IGNORED)
    config = MMDetectionConfig.of(file.meta)
    options, num_classes = _options(state, config, file.source)
    automatic, origin = _format(state, options["backbone"], config)
    options["backbone"]["input_format"] = chosen_format(input_format, automatic)
    settings = model_settings(options, overrides, file.source)

    def source_of(name: str) -> TensorSource:
        if names := fusion_names(name, "roi_head.grid_head.{order}order_trans"):
            return TensorSource(tuple(names))
        theirs = rename(name, [*_BODY, *_HEAD[settings.trunk.head]])
        assert theirs is not None, f"{name} has no name in mmdetection"
        return TensorSource((theirs,), background_last="fc_cls" in theirs)

    converted = convert_tensors(state, settings, num_classes, source_of, file.source)
    origin = "as given" if input_format is not None else origin
    notes = [f"input: {describe_format(settings.backbone.resolved_format)} ({origin})"]
    notes += [f"the {part} of the file is not used" for part in ignored]
    notes += config.differences()
    categories = _categories(config.classes, num_classes)
    description = f"mmdetection {_KINDS[settings.trunk.head]}, {settings.backbone.name}, {num_classes} classes"
    return ConvertedDetector(settings, num_classes, converted, categories, description, tuple(notes))


def _options(state: Mapping[str, Tensor], config: MMDetectionConfig, source: str) -> tuple[dict[str, Any], int]:
    """The arguments of ``ModelSettings.from_options``, and the number of classes."""
    other = f"{source}: not a Faster, Cascade or Grid R-CNN with ResNet and FPN of mmdetection 2.x or 3.x"
    stages = count(state, r"roi_head\.bbox_head\.(\d)\.")
    grid = any(name.startswith("roi_head.grid_head.") for name in state)
    if grid and stages:
        raise UserError(f"{other}: it has a cascade of box heads and a grid head")
    box_head = "roi_head.bbox_head.0." if stages else "roi_head.bbox_head."
    options: dict[str, Any] = {
        "backbone": resnet_options(state, [f"backbone.layer{stage}." for stage in (1, 2, 3, 4)], other),
        "head": "cpm" if grid else "cascade" if stages else "faster",
        "convention": "mmdetection",
        "fpn_channels": weight_shape(state, "neck.lateral_convs.0.conv.weight", other)[0],
        "mlp_channels": weight_shape(state, f"{box_head}shared_fcs.0.weight", other)[0],
        "score_threshold": 0.03 if grid else 0.05,
        "nms_iou": 0.3 if grid else 0.5,
        "max_detections": 100,
    }
    if grid:
        options |= _grid_options(state, other)
    elif stages:
        if stages != len(_CASCADE_STDS):
            raise UserError(f"{source}: a cascade of {stages} stages; a Cascade R-CNN has 3")
        stds = [config.target_stds(k) or default for k, default in enumerate(_CASCADE_STDS)]
        options["stages"] = cascade_stages([[1 / x for x in values] for values in stds])
        options["score_average"] = "logits"
    elif (stds_of_file := config.target_stds(None)) not in (None, _FASTER_STDS):
        raise UserError(f"{source}: target_stds={list(stds_of_file or ())} instead of {list(_FASTER_STDS)}")
    config.check_anchors(source)
    return options | config.test_options(), weight_shape(state, f"{box_head}fc_cls.weight", other)[0] - 1


def _grid_options(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The options of a Grid R-CNN: one grid stage, whose heatmap covers twice the width and height of the box."""
    head = "roi_head.grid_head."
    return {
        "stages": [{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0}],
        "ism": False,
        "rsm": False,
        "fusion": any("order_trans" in name for name in state),
        "point_channels": weight_shape(state, f"{head}deconv1.weight", source)[0] // 9,
        "grid_convs": max(count(state, rf"{re.escape(head)}convs\.(\d+)\."), 1),
    }


def _format(
    state: Mapping[str, Tensor], backbone: Mapping[str, Any], config: MMDetectionConfig
) -> tuple[InputFormat, str]:
    """The input format, and how it is known."""
    if config.input_format is not None:
        return config.input_format, "from the configuration in the file"
    layout = layout_of(backbone)
    if layout == X101_32X8D:
        return CAFFE2_X101, "assumed, as in mmdetection's model zoo; set backbone.input_format if it differs"
    advice = "style {}, estimated from the first layer; set backbone.input_format if it differs"
    names = ("backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.running_var")
    weight, scale, variance = (state.get(name) for name in names)
    if weight is None or scale is None or len(weight) != len(scale):
        return RGB, ""  # reported when names and shapes are compared
    # Caffe-style weights store their BatchNorms merged, with a neutral variance of 1.
    neutral = variance is None or bool((variance - 1).abs().max() < 1e-3)
    trained = trained_deviation(weight, scale, None if neutral else variance)
    if layout.can_stride_in_1x1 and trained is not None and trained > _RAW_PIXELS:
        return MSRA, advice.format("caffe")
    return RGB, advice.format("pytorch")


def _categories(classes: list[str] | None, num_classes: int) -> list[dict[str, Any]] | None:
    """The classes that the file names, with COCO's ids if they are COCO's; None if it names none."""
    if classes is None or len(classes) != num_classes:
        return COCO_CATEGORIES if classes is None and num_classes == len(COCO_CATEGORIES) else None
    if classes == [category["name"] for category in COCO_CATEGORIES]:
        return COCO_CATEGORIES
    return [{"id": k, "name": name} for k, name in enumerate(classes, start=1)]
