"""The authors' released weights: from their names to this project's model (spec sections 9 and 10)."""

import re
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpm_rcnn.errors import UserError, check_keys
from cpm_rcnn.models.backbones.resnet import RESNETS, ResNetLayout
from cpm_rcnn.models.build import CMM_STAGES, build_detector
from cpm_rcnn.models.detector import CPMRCNN
from cpm_rcnn.weights.files import check_names, named_tensors, read_weights
from cpm_rcnn.weights.imagenet import with_statistics

# What the released models were trained on.
RELEASE_PIXEL_FORMAT = {"order": "bgr", "scale": 1, "mean": [102.9801, 115.9465, 122.7717], "std": [1, 1, 1]}
# Two stages are the ablation's, which isolates ISM or RSM (spec section 5).
_TWO_STAGES = (CMM_STAGES[0], {**CMM_STAGES[0], "loss_weight": CMM_STAGES[1]["loss_weight"]})
_STAGES = {1: CMM_STAGES[:1], 2: _TWO_STAGES, 3: CMM_STAGES}
# Grid points that exchange features, receiver by receiver; the release numbers the senders of each.
_SENDERS = [2, 3, 2, 3, 4, 3, 2, 3, 2]

_ISM = r"Grid_Cascade_RCNN\.Output_grid_\d\.iou_"
_RSM = r"Grid_Cascade_RCNN\.(Head|Output)_rescore\."

# The release's names of our parameters: a pattern of ours, and theirs.
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
    # Each of our layers is a convolution, its norm and a ReLU in one sequence; theirs are numbered by layer.
    (
        r"head\.stages\.(\d)\.convs\.(\d+)",
        lambda m: f"Grid_Cascade_RCNN.Head_grid_{m[1]}.convs.{int(m[2]) // 3}.{int(m[2]) % 3}",
    ),
    (r"head\.stages\.(\d)\.deconvs\.0", r"Grid_Cascade_RCNN.Output_grid_\1.deconv_1"),
    (r"head\.stages\.(\d)\.deconvs\.1", r"Grid_Cascade_RCNN.Output_grid_\1.norm1"),
    (r"head\.stages\.(\d)\.deconvs\.3", r"Grid_Cascade_RCNN.Output_grid_\1.deconv_2"),
]


def from_release(path_or_state_dict: str | Path | Mapping[str, Any], **overrides: Any) -> CPMRCNN:
    """The detector of a released file, ready to detect.

    Its architecture is read off the names and shapes; it works in the release's pixel convention (``inclusive``), on
    BGR images in 0..255, and finds what the release finds.

    Args:
        path_or_state_dict: a released ``.pth``, or its content: bare or under ``model``, with or without ``module.``.
        **overrides: arguments of :func:`~cpm_rcnn.models.build.build_detector` to replace: ``score_threshold``,
            ``nms_iou``, ``test_stages``, ``proposals_test``, ``stages`` (as many), or ``ism=False`` and ``rsm=False``,
            which leave those parts of the file out.

    Returns:
        The detector in eval mode on the CPU.

    Raises:
        UserError: no such file; a damaged one; names or shapes that are missing, unexpected or wrong, all listed; an
            override that does not exist or fit.
    """
    state, source = _read(path_or_state_dict)
    detector = build_release(release_arguments(state, source) | _checked(overrides), source)
    detector.load_state_dict(convert_state(state, detector, source))
    return detector.eval()


def release_arguments(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The arguments of ``build_detector``, ``num_classes`` among them, that a released state tells.

    Args:
        state: tensors under the release's names, without ``module.``.
        source: where they came from, for messages.

    Raises:
        UserError: a name that tells the architecture is missing.
    """

    def shape(name: str) -> torch.Size:
        if name not in state or state[name].ndim < 2:
            raise UserError(f"{source}: not a released CPM R-CNN: lacks {name}")
        return state[name].shape

    def count(pattern: str) -> int:
        """How many numbers 0, 1, .. the pattern's group takes on; holes are found when names are compared."""
        return max((int(m[1]) + 1 for m in (re.match(pattern, name) for name in state) if m), default=0)

    body = "Conv_Body.layer"
    blocks = [count(rf"Conv_Body\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    width, channels = shape(f"{body}1.0.conv2.weight")[:2]
    # Sizes that no model has become ones that the comparison of names will find wrong.
    layout = ResNetLayout(
        tuple(max(n, 1) for n in blocks), groups=max(width // max(channels, 1), 1), width_per_group=max(channels, 1)
    )
    name = next((name for name, known in RESNETS.items() if known == layout), "resnet")
    backbone: dict[str, Any] = {
        "name": name,
        "weights": None,
        "frozen_stages": 2,
        "deformable_stages": [s for s in (3, 4, 5) if count(rf"Conv_Body\.layer{s - 1}\.(\d+)\.conv2\.conv_offset")],
        "stride_in_1x1": layout.groups == 1,
        "pixel_format": RELEASE_PIXEL_FORMAT,
    }
    if name == "resnet":
        backbone["layout"] = {
            "blocks": list(layout.blocks),
            "groups": layout.groups,
            "width_per_group": layout.width_per_group,
        }
    head = "Grid_Cascade_RCNN."
    stages = count(rf"{head}(?:Head|Output)_grid_(\d)\.")
    if stages not in _STAGES:
        raise UserError(f"{source}: not a released CPM R-CNN: {stages} grid stages instead of 1, 2 or 3")
    return {
        "backbone": backbone,
        "num_classes": shape(f"{head}Output_cls.cls_score.weight")[0] - 1,
        "stages": [dict(stage) for stage in _STAGES[stages]],
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


def build_release(arguments: Mapping[str, Any], source: str) -> CPMRCNN:
    """The detector of ``arguments``, those of a file among them.

    Raises:
        UserError: no detector has them; names the file.
    """
    try:
        return build_detector(**arguments)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def convert_state(state: Mapping[str, Tensor], detector: CPMRCNN, source: str) -> dict[str, Tensor]:
    """A released state under the names of ``detector``; parts that ``detector`` leaves out (ISM, RSM) are dropped.

    Args:
        state: tensors under the release's names; BatchNorm with its statistics, or merged into scale and shift.
        detector: of the state's architecture.
        source: where the state came from, for messages.

    Raises:
        UserError: names or shapes that are missing, unexpected or wrong.
    """
    state = {name: value for name, value in with_statistics(state).items() if not name.endswith("num_batches_tracked")}
    for part, names_of in ((detector.head.ism, _ISM), (detector.head.rsm, _RSM)):
        if part is None:
            state = {name: value for name, value in state.items() if not re.match(names_of, name)}
    if wild := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"{source}: {len(wild)} not finite: {', '.join(wild[:6])}")
    own = detector.state_dict()
    names = {name: release_names(name, len(detector.head.stages)) for name in own}
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
    """The release's names of the parameters that, one after the other, are ours of ``name``.

    Fusion's convolutions, 24 in the release, are one grouped convolution here; all other parameters are one for one.

    Args:
        name: of a parameter or buffer of :class:`~cpm_rcnn.models.detector.CPMRCNN`.
        stages: grid stages of the model; ISM belongs to the last.
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


def _read(path_or_state_dict: str | Path | Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    if isinstance(path_or_state_dict, Mapping):
        return named_tensors(path_or_state_dict, "state_dict"), "state_dict"
    return read_weights(path_or_state_dict, "src"), f"src={path_or_state_dict}"


def _checked(overrides: dict[str, Any]) -> dict[str, Any]:
    allowed = [name for name in signature(build_detector).parameters if name not in ("backbone", "num_classes")]
    check_keys("from_release", overrides, allowed, [])
    return overrides
