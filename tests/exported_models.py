"""Small detectors of all heads and backbone families, whose detections in a file can be compared with theirs."""

import numpy as np
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.data.shapes import render
from cpm_rcnn.inference import Detector
from cpm_rcnn.models.build import build_detector
from small_models import CATEGORIES, SMALL

_RESNEXT = {"name": "resnet", "layout": {"blocks": [1, 1, 1, 1], "groups": 4, "width_per_group": 8}}
BACKBONES = {
    "tiny": {"name": "tiny"},
    "ResNet": {"name": "resnet", "layout": {"blocks": [1, 1, 1, 1], "bottleneck": False}},
    "ResNeXt": _RESNEXT,
    "deformable ResNeXt": {**_RESNEXT, "deformable_stages": [3, 4, 5]},
    "timm": {"name": "test_resnet"},
}
CMM = [{"positive_iou": 0.5, "mapping_ratio": ratio, "loss_weight": 1.0} for ratio in (1.0, 0.5)]
_BOX_STAGES = [
    {"positive_iou": 0.5, "coder_weights": [2 * weight, 2 * weight, weight, weight], "loss_weight": 1.0}
    for weight in (5, 10)
]
HEADS = {
    "CPM with CMM, ISM and RSM": {"stages": CMM, "ism": True, "rsm": True},
    "CPM with fusion": {"stages": CMM[:1], "ism": False, "rsm": False, "fusion": True},
    "cascade": {"head": "cascade", "stages": _BOX_STAGES},
    "faster": {"head": "faster"},
}
# Height and width; the smallest image is one cell of the coarsest feature map of the backbone.
_SIZES = ((64, 96), (32, 32), (97, 130))


def make_detector(sizes=None, **options):
    """A detector whose large random weights give heatmaps and scores of all sizes."""
    torch.manual_seed(0)
    settings = {"proposals_test": 10, "score_threshold": 0.2, "anchor_sizes": (16, 32, 64, 128, 256)}
    if options.get("head", "cpm") != "cpm":
        settings |= {"point_channels": ..., "grid_convs": ...}
    chosen = {name: value for name, value in (SMALL | settings | options).items() if value is not ...}
    net = build_detector(num_classes=2, **chosen).eval().requires_grad_(False)
    for name, layer in net.named_modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.weight.copy_(torch.rand(len(layer.weight)) * 0.5 + 0.4)
            layer.bias.copy_(torch.randn(len(layer.bias)) * 0.2)
        if name.endswith("conv_offset"):
            nn.init.normal_(layer.weight, std=0.02)
        if name.endswith(("classifier.predictor", "cls_logits", "rsm.predictor")):
            nn.init.normal_(layer.weight, std=0.5)
        if name.endswith("deconvs.3"):
            nn.init.normal_(layer.weight, std=0.3)
        if name.endswith("ism.predictor"):
            nn.init.constant_(layer.bias, 0.5)
    return Detector(net, CATEGORIES, **(sizes or {"short_side": 64, "max_size": 96}))


def drawn_image(height, width):
    """A part of a drawing of shapes, uint8 (3, H, W)."""
    return torch.from_numpy(render(np.random.default_rng(height))[0][:height, :width].transpose(2, 0, 1).copy())


def three_sizes():
    """Drawn images of three sizes by name."""
    return {f"{height} x {width}": drawn_image(height, width) for height, width in _SIZES}
