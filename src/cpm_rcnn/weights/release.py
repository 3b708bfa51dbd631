"""The authors' released weights, converted to this project's model (docs/method.md sections 9 and 10)."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.build import build
from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.models.heads.cpm import CMM_STAGES, TWO_STAGES, CPMSettings
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.weights.detector_files import (
    ConvertedDetector,
    DetectorFile,
    Rule,
    TensorSource,
    convert_tensors,
    count,
    fusion_names,
    model_settings,
    rename,
    resnet_options,
    weight_shape,
)
from cpm_rcnn.weights.reading import named_tensors, read_weights

# The stage settings of a released model, by its number of stages.
_STAGES = {1: CMM_STAGES[:1], 2: TWO_STAGES, 3: CMM_STAGES}
_ISM = r"Grid_Cascade_RCNN\.Output_grid_\d\.iou_"
_RSM = r"Grid_Cascade_RCNN\.(Head|Output)_rescore\."

# Pairs of a pattern that matches a parameter name of this project, and the release's name.
_NAMES: list[Rule] = [
    (r"backbone\.body\.stem\.", "Conv_Body."),
    (r"backbone\.body\.layers\.(\d)", lambda m: f"Conv_Body.layer{int(m[1]) + 1}"),
    (r"backbone\.fpn\.inner_blocks\.3\.0", "Conv_Body_FPN.p5_in"),
    (r"backbone\.fpn\.layer_blocks\.3\.0", "Conv_Body_FPN.p5_out"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0", lambda m: f"Conv_Body_FPN.fpn_in.{2 - int(m[1])}"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0", lambda m: f"Conv_Body_FPN.fpn_out.{2 - int(m[1])}"),
    (r"rpn\.head\.conv\.0\.0", "RPN.head.conv"),
    (r"rpn\.", "RPN."),
    (r"head\.classifier\.mlp", "Grid_Cascade_RCNN.Head_cls"),
    (r"head\.classifier\.predictor", "Grid_Cascade_RCNN.Output_cls.cls_score"),
    (r"head\.rsm\.mlp", "Grid_Cascade_RCNN.Head_rescore"),
    (r"head\.rsm\.predictor", "Grid_Cascade_RCNN.Output_rescore.cls_score"),
    # Convolution, norm and ReLU are items of one sequence here; the release numbers layers and items separately.
    (
        r"head\.stages\.(\d)\.convs\.(\d+)",
        lambda m: f"Grid_Cascade_RCNN.Head_grid_{m[1]}.convs.{int(m[2]) // 3}.{int(m[2]) % 3}",
    ),
    (r"head\.stages\.(\d)\.deconvs\.0", r"Grid_Cascade_RCNN.Output_grid_\1.deconv_1"),
    (r"head\.stages\.(\d)\.deconvs\.1", r"Grid_Cascade_RCNN.Output_grid_\1.norm1"),
    (r"head\.stages\.(\d)\.deconvs\.3", r"Grid_Cascade_RCNN.Output_grid_\1.deconv_2"),
]


def from_release(path_or_state_dict: str | Path | Mapping[str, Any], **overrides: Any) -> TwoStageDetector:
    """The detector of a released file, in eval mode on the CPU.

    Its architecture is derived from names and shapes. It uses the release's box convention (``inclusive``) and input
    format (BGR in 0..255), and it reproduces the release's detections.

    Args:
        path_or_state_dict: a released ``.pth``, or its content: bare or under ``model``, with or without ``module.``.
        **overrides: options of :func:`~cpm_rcnn.models.build.build_detector` to replace: ``score_threshold``,
            ``nms_iou``, ``test_stages``, ``proposals_test``, ``stages`` (of the same number), or ``ism=False`` and
            ``rsm=False``, which skip those parts of the file.

    Raises:
        UserError: the file does not exist or is damaged; names or shapes are missing, unexpected or wrong (all are
            listed); or an override is unknown or invalid.
    """
    if isinstance(path_or_state_dict, Mapping):
        state, source = named_tensors(path_or_state_dict, "state_dict"), "state_dict"
    else:
        state, source = read_weights(path_or_state_dict, "src"), f"src={path_or_state_dict}"
    settings, num_classes = release_settings(state, source, **overrides)
    detector = build(settings, num_classes)
    detector.load_state_dict(convert_state(state, settings, num_classes, source))
    return detector.eval()


def recognizes(names: Collection[str]) -> bool:
    """Whether a file with these parameter names is a released CPM R-CNN."""
    return any(name.startswith(("Grid_Cascade_RCNN.", "Conv_Body.", "Conv_Body_FPN.")) for name in names)


def read(file: DetectorFile, input_format: Any = None, **overrides: Any) -> ConvertedDetector:
    """The detector of a released file.

    Args:
        file: content of the file.
        input_format: replaces the release's input format; see
            :class:`~cpm_rcnn.models.backbones.settings.BackboneSettings`.
        **overrides: options that replace those derived from the file.

    Raises:
        ArgumentError: an override is invalid.
        UserError: the file is damaged.
    """
    settings, num_classes = release_settings(file.state, file.source, input_format=input_format, **overrides)
    state = convert_state(file.state, settings, num_classes, file.source)
    head = settings.head
    assert isinstance(head, CPMSettings)
    parts = [f"{len(head.stages)} grid stages"]
    parts += [name.upper() for name in ("ism", "rsm", "fusion") if getattr(head, name)]
    description = f"{settings.backbone.name}, {num_classes} classes, {', '.join(parts)}"
    complete = len(head.stages) == 3 and head.ism and head.rsm and head.grid_convs == CPMSettings.grid_convs
    notes = ("not one of the three published models; check that the file is complete",)
    published = complete and settings.backbone.name != "resnet"
    return ConvertedDetector(settings, num_classes, state, None, description, () if published else notes)


def release_settings(
    state: Mapping[str, Tensor], source: str, input_format: Any = None, **overrides: Any
) -> tuple[ModelSettings, int]:
    """The settings and the number of classes of a released model.

    Args:
        state: tensors by the release's names, without ``module.``.
        source: where the tensors came from, for messages.
        input_format: replaces the release's input format.
        **overrides: options that replace those derived from the file.

    Raises:
        ArgumentError: an override is invalid.
        UserError: names that determine the architecture are missing.
    """
    options, num_classes = _release_options(state, f"{source}: not a released CPM R-CNN")
    options["backbone"]["input_format"] = "caffe" if input_format is None else input_format
    return model_settings(options, overrides, source), num_classes


def _release_options(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Any], int]:
    """The arguments of :meth:`ModelSettings.from_options`, and the number of classes."""

    def shape(name: str) -> torch.Size:
        return weight_shape(state, name, source)

    backbone = resnet_options(state, [f"Conv_Body.layer{stage}." for stage in (1, 2, 3, 4)], source)
    head = "Grid_Cascade_RCNN."
    stages = count(state, rf"{head}(?:Head|Output)_grid_(\d)\.")
    if stages not in _STAGES:
        raise UserError(f"{source}: {stages} grid stages instead of 1, 2 or 3")
    options = {
        "backbone": backbone,
        "head": "cpm",
        "stages": _STAGES[stages],
        "ism": any(re.match(_ISM, name) for name in state),
        "rsm": any(re.match(_RSM, name) for name in state),
        "fusion": any("order_trans" in name for name in state),
        "convention": "inclusive",
        "fpn_channels": shape("Conv_Body_FPN.p5_in.weight")[0],
        "mlp_channels": shape(f"{head}Head_cls.fc6.weight")[0],
        "point_channels": shape(f"{head}Output_grid_0.deconv_1.weight")[0] // 9,
        "grid_convs": max(count(state, rf"{head}Head_grid_\d\.convs\.(\d+)\."), 1),
        "max_grid_rois": 32 if backbone["deformable_stages"] else 96,
    }
    return options, shape(f"{head}Output_cls.cls_score.weight")[0] - 1


def convert_state(
    state: Mapping[str, Tensor], settings: ModelSettings, num_classes: int, source: str
) -> dict[str, Tensor]:
    """A released state dict with this project's parameter names; ISM and RSM are dropped if the model has none.

    Args:
        state: tensors by the release's names; BatchNorm with its statistics, or merged into scale and shift.
        settings: settings of the model, derived from the same state.
        num_classes: number of foreground classes.
        source: where the state came from, for messages.

    Raises:
        UserError: names or shapes are missing, unexpected or wrong, or values are not finite.
    """
    head = settings.head
    assert isinstance(head, CPMSettings)
    for used, names_of in ((head.ism, _ISM), (head.rsm, _RSM)):
        if not used:
            state = {name: value for name, value in state.items() if not re.match(names_of, name)}
    stages = len(head.stages)

    def source_of(name: str) -> TensorSource:
        return TensorSource(tuple(release_names(name, stages)))

    return convert_tensors(state, settings, num_classes, source_of, source)


def release_names(name: str, stages: int) -> list[str]:
    """The release's names of the parameters whose concatenation is the parameter ``name`` of this project.

    The 24 convolutions of the release's feature fusion are one grouped convolution here. All other parameters
    correspond one to one.

    Args:
        name: this project's name of a parameter or buffer.
        stages: number of grid stages of the model; ISM belongs to the last.
    """
    if names := fusion_names(name, r"Grid_Cascade_RCNN.Head_grid_{stage}.{order}order_trans"):
        return names
    output = f"Grid_Cascade_RCNN.Output_grid_{stages - 1}"
    ism = [(r"head\.ism\.mlp\.0", "iou_fc1"), (r"head\.ism\.mlp\.2", "iou_fc2"), (r"head\.ism\.predictor", "iou_pred")]
    renamed = rename(name, [*_NAMES, *((ours, f"{output}.{theirs}") for ours, theirs in ism)])
    assert renamed is not None, f"{name} has no name in the release"
    return [renamed]
