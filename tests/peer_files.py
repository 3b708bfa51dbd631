"""Weight files of other programs for tests: the reference models of detectron2 and mmdetection, and small ones."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import torch
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

PEERS = Path(__file__).parent / "reference" / "peers"
PEER_CASES = ["d2_faster_r50", "d2_cascade_r50", "mmdet_cascade_r50", "mmdet_grid_r50"]

_spec = importlib.util.spec_from_file_location("peer_recipe", PEERS / "recipe.py")
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


def read_peer(case):
    return json.loads((PEERS / f"{case}.json").read_text())


def peer_state(case):
    """A reference case's parameters under its program's names."""
    content = read_peer(case)
    return {
        name: torch.from_numpy(np.ascontiguousarray(recipe.parameter(name, tuple(shape), content["raw_pixels"])))
        for name, shape in content["state_dict"]
    }


def peer_image(case):
    """A reference case's image, uint8 RGB (3, H, W)."""
    content = read_peer(case)
    bgr = recipe.image(content["height"], content["width"], content["image_seed"])
    return torch.from_numpy(np.ascontiguousarray(bgr[:, :, ::-1])).permute(2, 0, 1)


# Sizes of small models: pyramid, FC layers, grid points.
_FPN, _MLP, _POINT = 16, 8, 4


def small_shapes(case):
    """Names and shapes of a reference case with one block per backbone stage and few channels elsewhere."""
    shapes = {name: tuple(shape) for name, shape in read_peer(case)["state_dict"]}
    shapes = {name: shape for name, shape in shapes.items() if not _is_later_block(name)}
    return {name: _shrunk(name, shape) for name, shape in shapes.items()}


def _is_later_block(name):
    return re.match(r"backbone\.(?:bottom_up\.res|layer)\d\.[1-9]", name) is not None


def _shrunk(name, shape):
    if re.match(r"backbone\.(bottom_up\.|layer|conv1|bn1)", name):
        return shape
    if re.search(r"fpn_lateral|lateral_convs", name):
        return (_FPN, *shape[1:])
    if "grid_head" in name:
        sizes = {576: 9 * _POINT, 64: _POINT, 256: _FPN}
    else:
        sizes = {256: _FPN, 1024: _MLP, 12544: _FPN * 49}
    return tuple(sizes.get(side, side) for side in shape)


def torchvision_model(blocks=(1, 1, 1, 1), classes=90, *, fpn=_FPN, mlp=_MLP, short_side=224, draw=True):
    """torchvision's Faster R-CNN with drawn weights, and with BatchNorms as for ``COCO_V1``."""
    norm = functools.partial(FrozenBatchNorm2d, eps=0.0)
    body = _resnet_fpn_extractor(resnet.ResNet(resnet.Bottleneck, list(blocks), norm_layer=norm), 5)
    body.fpn = FeaturePyramidNetwork([256, 512, 1024, 2048], fpn, LastLevelMaxPool())
    body.out_channels = fpn
    sizes = tuple((size,) for size in (32, 64, 128, 256, 512))
    model = FasterRCNN(
        body,
        min_size=short_side,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        box_head=TwoMLPHead(fpn * 49, mlp),
        box_predictor=FastRCNNPredictor(mlp, classes + 1),
    )
    if not draw:
        return model
    state = {
        name: torch.from_numpy(np.ascontiguousarray(recipe.parameter(name, tuple(value.shape), False)))
        for name, value in model.state_dict().items()
    }
    # Smaller logits and deltas, so that neither scores nor box sizes saturate.
    state["roi_heads.box_predictor.bbox_pred.weight"] *= 0.3
    state["rpn.head.cls_logits.weight"] *= 0.5
    model.load_state_dict(state)
    return model.eval()


def small_state(case):
    """Tensors that share one element, so that they need no memory.

    Args:
        case: a reference case, ``mmdet_faster``, or ``torchvision``.
    """
    if case == "torchvision":
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in torchvision_model(draw=False).state_dict().items()}
    elif case == "mmdet_faster":
        shapes = {name: shape for name, shape in small_shapes("mmdet_grid_r50").items() if "grid_head" not in name}
        shapes |= {"roi_head.bbox_head.fc_reg.weight": (320, _MLP), "roi_head.bbox_head.fc_reg.bias": (320,)}
    else:
        shapes = small_shapes(case)
    return {name: torch.tensor(0.5).expand(shape) for name, shape in shapes.items()}


def legacy_names(state):
    """The names that torchvision's published files have for those of today."""
    short = {re.sub(r"(_blocks\.\d)\.0\.", r"\1.", name): value for name, value in state.items()}
    return {name.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for name, value in short.items()}
