"""The authors' released weights, converted to this project's model (docs/method.md sections 9 and 10)."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.models.backbones.resnet import RESNETS, ResNetLayout
from cpm_rcnn.models.build import build
from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.models.heads.cpm import CMM_STAGES, TWO_STAGES, CPMHead
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.weights.imagenet import with_statistics
from cpm_rcnn.weights.reading import check_names, named_tensors, read_weights

# The stage settings of a released model, by its number of stages.
_STAGES = {1: CMM_STAGES[:1], 2: TWO_STAGES, 3: CMM_STAGES}
# How many grid points send features to each point; the release numbers the senders of each receiver.
_SENDERS = [2, 3, 2, 3, 4, 3, 2, 3, 2]

_ISM = r"Grid_Cascade_RCNN\.Output_grid_\d\.iou_"
_RSM = r"Grid_Cascade_RCNN\.(Head|Output)_rescore\."

# Pairs of a pattern that matches a parameter name of this project, and the release's name.
_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
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
    detector.load_state_dict(convert_state(state, detector, source))
    return detector.eval()


def release_settings(state: Mapping[str, Tensor], source: str, **overrides: Any) -> tuple[ModelSettings, int]:
    """The settings and the number of classes of a released model.

    Args:
        state: tensors by the release's names, without ``module.``.
        source: where the tensors came from, for messages.
        **overrides: options that replace those derived from the file.

    Raises:
        ArgumentError: an override is invalid.
        UserError: names that determine the architecture are missing.
    """
    options, num_classes = _release_options(state, source)
    try:
        return ModelSettings.from_options(**{**options, **overrides}), num_classes
    except ArgumentError as error:
        if re.split(r"[.\[=]", error.argument)[0] in options.keys() - overrides.keys() - {"head"}:
            raise UserError(f"{source}: {error}") from None
        raise


def _release_options(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Any], int]:
    """The arguments of :meth:`ModelSettings.from_options`, and the number of classes."""

    def shape(name: str) -> torch.Size:
        if name not in state or state[name].ndim < 2:
            raise UserError(f"{source}: not a released CPM R-CNN: {name} is missing")
        return state[name].shape

    def count(pattern: str) -> int:
        """One more than the largest number that the pattern's group matches; gaps show when names are compared."""
        return max((int(m[1]) + 1 for m in (re.match(pattern, name) for name in state) if m), default=0)

    body = "Conv_Body.layer"
    blocks = [count(rf"Conv_Body\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    width, channels = shape(f"{body}1.0.conv2.weight")[:2]
    # Impossible sizes are replaced by valid ones; the comparison of names reports them later.
    layout = ResNetLayout(
        tuple(max(n, 1) for n in blocks), groups=max(width // max(channels, 1), 1), width_per_group=max(channels, 1)
    )
    name = next((name for name, known in RESNETS.items() if known == layout), "resnet")
    backbone: dict[str, Any] = {
        "name": name,
        "weights": None,
        "frozen_stages": 2,
        "deformable_stages": [s for s in (3, 4, 5) if count(rf"Conv_Body\.layer{s - 1}\.(\d+)\.conv2\.conv_offset")],
        "input_format": "caffe",
    }
    if name == "resnet":
        backbone["layout"] = layout
    head = "Grid_Cascade_RCNN."
    stages = count(rf"{head}(?:Head|Output)_grid_(\d)\.")
    if stages not in _STAGES:
        raise UserError(f"{source}: not a released CPM R-CNN: {stages} grid stages instead of 1, 2 or 3")
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
        "grid_convs": max(count(rf"{head}Head_grid_\d\.convs\.(\d+)\."), 1),
        "max_grid_rois": 32 if backbone["deformable_stages"] else 96,
    }
    return options, shape(f"{head}Output_cls.cls_score.weight")[0] - 1


def convert_state(state: Mapping[str, Tensor], detector: TwoStageDetector, source: str) -> dict[str, Tensor]:
    """A released state dict with the parameter names of ``detector``; ISM and RSM are dropped if it has none.

    Args:
        state: tensors by the release's names; BatchNorm with its statistics, or merged into scale and shift.
        detector: built from the settings of the same state.
        source: where the state came from, for messages.

    Raises:
        UserError: names or shapes are missing, unexpected or wrong, or values are not finite.
    """
    head = detector.head
    assert isinstance(head, CPMHead)
    state = {name: value for name, value in with_statistics(state).items() if not name.endswith("num_batches_tracked")}
    for part, names_of in ((head.ism, _ISM), (head.rsm, _RSM)):
        if part is None:
            state = {name: value for name, value in state.items() if not re.match(names_of, name)}
    if nonfinite := [name for name, value in state.items() if not value.isfinite().all()]:
        listed = ", ".join(nonfinite[:6])
        raise UserError(f"{source}: {len(nonfinite)} of {len(state)} tensors have non-finite values: {listed}")
    own = detector.state_dict()
    names = {name: release_names(name, len(head.stages)) for name in own}
    check_names(
        source,
        state,
        {
            theirs: torch.Size([own[name].shape[0] // len(parts), *own[name].shape[1:]])
            for name, parts in names.items()
            for theirs in parts
        },
    )
    return {name: torch.cat([state[theirs] for theirs in parts]) for name, parts in names.items()}


def release_names(name: str, stages: int) -> list[str]:
    """The release's names of the parameters whose concatenation is the parameter ``name`` of this project.

    The 24 convolutions of the release's feature fusion are one grouped convolution here. All other parameters
    correspond one to one.

    Args:
        name: this project's name of a parameter or buffer.
        stages: number of grid stages of the model; ISM belongs to the last.
    """
    if match := re.fullmatch(r"head\.stages\.(\d)\.fusion\.(f|s)\w+_order\.(\d)\.(weight|bias)", name):
        stage, order, layer, kind = match.groups()
        prefix = f"Grid_Cascade_RCNN.Head_grid_{stage}.{order}order_trans"
        return [f"{prefix}.{point}.{i}.{layer}.{kind}" for point, many in enumerate(_SENDERS) for i in range(many)]
    output = f"Grid_Cascade_RCNN.Output_grid_{stages - 1}"
    ism = [(r"head\.ism\.mlp\.0", "iou_fc1"), (r"head\.ism\.mlp\.2", "iou_fc2"), (r"head\.ism\.predictor", "iou_pred")]
    for pattern, theirs in _NAMES + [(ours, f"{output}.{theirs}") for ours, theirs in ism]:
        renamed, found = re.subn(rf"^{pattern}", theirs, name)
        if found:
            return [renamed]
    raise AssertionError(f"{name} has no name in the release")
