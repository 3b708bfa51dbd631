"""Whole models against what the authors' released implementation computes (``tests/reference/README.md``).

The release's parameter names are mapped onto ours here; reading released files for users is another matter.
"""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import resnet

from cpm_rcnn.models import backbone
from cpm_rcnn.models.build import CMM_STAGES, build_detector

REFERENCE = Path(__file__).parents[1] / "reference"
CASES = ["base_tiny", "fused_tiny", "cmm3_tiny", "ism1_tiny", "rsm2_tiny", "cpm_r50_tiny", "x101dcn_tiny"]
PIXEL_FORMAT = {"order": "bgr", "scale": 1, "mean": [102.9801, 115.9465, 122.7717], "std": [1, 1, 1]}

_spec = importlib.util.spec_from_file_location("recipe", REFERENCE / "recipe.py")
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)

# (pattern, replacement), applied in order.
RENAMES = [
    (r"^Conv_Body\.(conv1|bn1)", r"backbone.body.stem.\1"),
    (r"^Conv_Body\.layer(\d)", lambda m: f"backbone.body.layers.{int(m[1]) - 1}"),
    (r"^Conv_Body_FPN\.p5_in", "backbone.fpn.inner_blocks.3.0"),
    (r"^Conv_Body_FPN\.p5_out", "backbone.fpn.layer_blocks.3.0"),
    (r"^Conv_Body_FPN\.fpn_in\.(\d)", lambda m: f"backbone.fpn.inner_blocks.{2 - int(m[1])}.0"),
    (r"^Conv_Body_FPN\.fpn_out\.(\d)", lambda m: f"backbone.fpn.layer_blocks.{2 - int(m[1])}.0"),
    (r"^RPN\.head\.conv\.", "rpn.head.conv.0.0."),
    (r"^RPN\.", "rpn."),
    (r"^Grid_Cascade_RCNN\.", ""),
    (r"^Head_cls", "head.classifier.mlp"),
    (r"^Output_cls\.cls_score", "head.classifier.predictor"),
    (r"^Head_rescore", "head.rsm.mlp"),
    (r"^Output_rescore\.cls_score", "head.rsm.predictor"),
    (r"^Head_grid_(\d)\.convs\.(\d)\.(\d)", lambda m: f"head.stages.{m[1]}.convs.{3 * int(m[2]) + int(m[3])}"),
    (r"^Output_grid_\d\.iou_fc1", "head.ism.mlp.0"),
    (r"^Output_grid_\d\.iou_fc2", "head.ism.mlp.2"),
    (r"^Output_grid_\d\.iou_pred", "head.ism.predictor"),
    (r"^Output_grid_(\d)\.deconv_1", r"head.stages.\1.deconvs.0"),
    (r"^Output_grid_(\d)\.norm1", r"head.stages.\1.deconvs.1"),
    (r"^Output_grid_(\d)\.deconv_2", r"head.stages.\1.deconvs.3"),
]
FUSION = re.compile(r"Head_grid_(\d)\.(f|s)order_trans\.(\d)\.(\d)\.(\d)\.(weight|bias)")


def our_state(state_dict):
    """The reference's parameters under our names; the convolutions of fusion's 24 edges in one."""
    ours, edges = {}, {}
    for name, shape in state_dict:
        value = torch.from_numpy(np.ascontiguousarray(recipe.parameter(name, tuple(shape))))
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if edge := FUSION.match(name):
            stage, order, sink, nth, layer, kind = edge.groups()
            key = f"head.stages.{stage}.fusion.{'first' if order == 'f' else 'second'}_order.{layer}.{kind}"
            edges.setdefault(key, {})[int(sink), int(nth)] = value
        else:
            ours[name] = value
    return ours | {key: torch.cat([parts[edge] for edge in sorted(parts)]) for key, parts in edges.items()}


def one_block_resnet(groups):
    def make(name, weights=None, norm_layer=None):
        options = {"groups": groups, "width_per_group": 4} if groups > 1 else {}
        return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], norm_layer=norm_layer, **options)

    return make


def build(case, monkeypatch):
    content = json.loads((REFERENCE / f"{case}.json").read_text())
    names = " ".join(name for name, _ in content["state_dict"])
    deformable = "conv_offset" in names
    monkeypatch.setattr(backbone, "get_model", one_block_resnet(64 if deformable else 1))
    stages = [CMM_STAGES[0]] * 2 if case == "rsm2_tiny" else CMM_STAGES[: content["stages"]]
    detector = build_detector(
        {
            "name": "resnext101_64x4d" if deformable else "resnet50",
            "deformable": deformable,
            "stride_in_1x1": not deformable,
            "pixel_format": PIXEL_FORMAT,
        },
        80,
        stages=stages,
        ism="iou_pred" in names,
        rsm="Head_rescore" in names,
        fusion="forder_trans" in names,
        pixels="inclusive",
        fpn_channels=64,
        mlp_channels=64,
        point_channels=8,
        score_threshold=0.15,
    ).eval()
    detector.load_state_dict(our_state(content["state_dict"]))
    bgr = recipe.image(content["height"], content["width"], content["image_seed"])
    image = torch.from_numpy(np.ascontiguousarray(bgr[:, :, ::-1])).permute(2, 0, 1)
    return detector, image, np.load(REFERENCE / f"{case}.npz")


def sample(feature):
    flat = feature.contiguous().flatten()
    return flat[:: max(1, flat.numel() // 512)][:512].numpy()


@pytest.mark.parametrize("case", CASES)
def test_a_whole_model_finds_what_the_release_finds(case, monkeypatch):
    detector, image, reference = build(case, monkeypatch)
    with torch.inference_mode():
        batch, sizes = detector.pixel_format([image])
        maps = dict(zip(("c2", "c3", "c4", "c5"), detector.backbone.body(batch))) | detector.backbone(batch)
        proposals, _ = detector.rpn([maps[f"p{level}"] for level in range(2, 7)], sizes)
        found = detector([image])[0]
    for name, feature in maps.items():
        expected = reference[f"{name}_sample"]
        np.testing.assert_allclose(sample(feature), expected, atol=1e-3 * expected.std(), rtol=0)
    nearest = np.abs(reference["proposals"][:, None] - proposals.boxes.numpy()).max(-1).min(1)
    assert (nearest < 0.05).mean() >= 0.99
    boxes, scores, labels = (found[key].numpy() for key in ("boxes", "scores", "labels"))
    matched = [
        ((labels == label) & (np.abs(boxes - box).max(1) < 0.05) & (np.abs(scores - score) < 1e-4)).any()
        for box, score, label in zip(*(reference[f"final_{key}"] for key in ("boxes", "scores", "labels")))
    ]
    assert len(matched) >= 100
    assert np.mean(matched) >= 0.99
    assert len(boxes) == pytest.approx(len(matched), rel=0.01)
