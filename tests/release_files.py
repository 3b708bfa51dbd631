"""Released state dicts for tests: those of the small reference models, and names and shapes of the full-size ones."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from torchvision.models import resnet

REFERENCE = Path(__file__).parent / "reference"
CASES = ["base_tiny", "fused_tiny", "cmm3_tiny", "ism1_tiny", "rsm2_tiny", "cpm_r50_tiny", "x101dcn_tiny"]

_spec = importlib.util.spec_from_file_location("recipe", REFERENCE / "recipe.py")
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


def case_state(case):
    """A reference case's parameters under the release's names."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(recipe.parameter(name, tuple(shape))))
        for name, shape in read_case(case)["state_dict"]
    }


def read_case(case):
    return json.loads((REFERENCE / f"{case}.json").read_text())


def case_image(case):
    """A reference case's image, uint8 RGB (3, H, W)."""
    content = read_case(case)
    bgr = recipe.image(content["height"], content["width"], content["image_seed"])
    return torch.from_numpy(np.ascontiguousarray(bgr[:, :, ::-1])).permute(2, 0, 1)


def release_shapes(
    blocks, groups=1, width=64, *, deformable=False, stages=3, ism=True, rsm=True, fusion=False, **sizes
):
    """Every name and shape of a released model, following the pattern of the reference models.

    Independent of the package: torchvision's ResNet gives the names of the body; all others are listed here.
    """
    fpn, mlp, point, convs = (sizes.get(key, default) for key, default in SIZES.items())
    with torch.device("meta"):
        body = resnet.ResNet(resnet.Bottleneck, blocks, groups=groups, width_per_group=width)
    shapes = {
        f"Conv_Body.{name}": tuple(value.shape)
        for name, value in body.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    if deformable:
        for name in [n for n in shapes if n.endswith("conv2.weight") and "layer1" not in n]:
            channels = shapes[name.replace("conv2", "conv1")][0]
            offset = name.removesuffix("weight") + "conv_offset."
            shapes |= {f"{offset}weight": (18, channels, 3, 3), f"{offset}bias": (18,)}

    def layer(name, *weight, bias=None):
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = (weight[0] if bias is None else bias,)

    for name, channels in (("p5_in", 2048), ("fpn_in.0", 1024), ("fpn_in.1", 512), ("fpn_in.2", 256)):
        layer(f"Conv_Body_FPN.{name}", fpn, channels, 1, 1)
    for name in ("p5_out", "fpn_out.0", "fpn_out.1", "fpn_out.2"):
        layer(f"Conv_Body_FPN.{name}", fpn, fpn, 3, 3)
    layer("RPN.head.conv", fpn, fpn, 3, 3)
    layer("RPN.head.cls_logits", 3, fpn, 1, 1)
    layer("RPN.head.bbox_pred", 12, fpn, 1, 1)
    head = "Grid_Cascade_RCNN."
    for part in ["cls"] + ["rescore"] * rsm:
        layer(f"{head}Head_{part}.fc6", mlp, fpn * 49)
        layer(f"{head}Head_{part}.fc7", mlp, mlp)
        layer(f"{head}Output_{part}.cls_score", 81, mlp)
    wide = 9 * point
    for k in range(stages):
        for i in range(convs):
            layer(f"{head}Head_grid_{k}.convs.{i}.0", wide, wide if i else fpn, 3, 3)
            layer(f"{head}Head_grid_{k}.convs.{i}.1", wide)
        layer(f"{head}Output_grid_{k}.norm1", wide)
        layer(f"{head}Output_grid_{k}.deconv_1", wide, point, 4, 4)
        layer(f"{head}Output_grid_{k}.deconv_2", wide, 1, 4, 4, bias=9)
        if fusion:
            for order in "fs":
                for receiver, senders in enumerate((2, 3, 2, 3, 4, 3, 2, 3, 2)):
                    for sender in range(senders):
                        edge = f"{head}Head_grid_{k}.{order}order_trans.{receiver}.{sender}"
                        layer(f"{edge}.0", point, 1, 5, 5)
                        layer(f"{edge}.1", point, point, 1, 1)
    if ism:
        layer(f"{head}Output_grid_{stages - 1}.iou_fc1", 1024, wide * 49)
        layer(f"{head}Output_grid_{stages - 1}.iou_fc2", 1024, 1024)
        layer(f"{head}Output_grid_{stages - 1}.iou_pred", 2, 1024)
    return shapes


SIZES = {"fpn": 256, "mlp": 1024, "point": 64, "convs": 8}
FULL = {
    "r50": {"blocks": [3, 4, 6, 3]},
    "r101": {"blocks": [3, 4, 23, 3]},
    "x101_dcn": {"blocks": [3, 4, 23, 3], "groups": 64, "width": 4, "deformable": True},
}


def merged(shapes):
    """The names that a training checkpoint has: BatchNorm as scale and shift, without statistics."""
    return {name: shape for name, shape in shapes.items() if "running_" not in name}


def state_of(shapes):
    """Tensors of those shapes that share one element, so that they need no memory."""
    return {name: torch.tensor(0.5).expand(shape) for name, shape in shapes.items()}
