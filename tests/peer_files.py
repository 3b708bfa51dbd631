"""Weight files of other programs for tests: the reference models of detectron2 and mmdetection, and small ones."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

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
