"""``export``: an ONNX file, run as docs/export.md says in a process that cannot import torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import refused
from torch import nn

from cpm_rcnn import load
from cpm_rcnn.weights.checkpoints import write_checkpoint
from small_models import CATEGORIES, small_module

DOCUMENT = Path(__file__).parents[2] / "docs/export.md"
NO_TORCH = "import sys; sys.modules['torch'] = sys.modules['cpm_rcnn'] = None\n"


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory):
    """A checkpoint of a CPM head with two grid stages, ISM and RSM, whose large weights give many scores."""
    module = small_module(
        score_threshold=0.2, stages=[{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0}] * 2
    )
    with torch.no_grad():
        for name, layer in module.model.named_modules():
            if name.endswith(("predictor", "cls_logits", "deconvs.3")):
                nn.init.normal_(layer.weight, std=0.5)
            if name.endswith("ism.predictor"):
                nn.init.constant_(layer.bias, 0.5)
    hyper = {name: value for name, value in module.hparams.items() if name != "format"}
    path = tmp_path_factory.mktemp("detector") / "detector.ckpt"
    write_checkpoint(path, module.model.state_dict(), hyper)
    return path


@pytest.fixture
def pictures(tmp_path):
    """Two pictures at the size of the test, 64 x 96 and 64 x 80."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for width in (96, 80):
        pixels = np.random.default_rng(width).integers(0, 256, (64, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{width}.png")
    return folder


def test_onnxruntime_alone_finds_what_the_model_finds(command, detector_file, pictures, tmp_path):
    target = tmp_path / "files" / "detector.onnx"
    answer = command(
        "export", f"ckpt={detector_file}", f"dst={target}", f"source={pictures}", "detector.proposals_test=15"
    )
    assert answer.status == 0, answer.err
    summary, path = answer.out.splitlines()
    assert re.fullmatch(
        r"\d+ detections in 2 images; largest differences from the model: .* pixels, .* in scores", summary
    )
    assert path == str(target)
    assert [file.name for file in target.parent.iterdir()] == ["detector.onnx"]
    script = re.search(r'```python\n("""Detect in an image.*?)```', DOCUMENT.read_text(), re.DOTALL)[1]
    (tmp_path / "detect.py").write_text(NO_TORCH + script.replace("[0.3]", "[0.01]"))
    ran = subprocess.run(
        [sys.executable, tmp_path / "detect.py", target, pictures / "96.png"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    (expected,) = load(detector_file, proposals_test=15).detect(pictures / "96.png", score_threshold=0.01)
    assert len(found) == len(expected) > 3
    assert [each["class"] for each in found] == expected.names
    torch.testing.assert_close(torch.tensor([each["score"] for each in found]), expected.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor([each["box"] for each in found]), expected.boxes, rtol=0, atol=0.05)
    assert {category["name"] for category in CATEGORIES} >= set(expected.names)
    again = refused(command("export", f"ckpt={detector_file}", f"dst={target}"))
    assert again == f"error: dst={target}: exists already; delete it, or give another name"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["dst=a.pt2"], "dst=a.pt2: with format=onnx the name must end in .onnx"),
        (["dst=a.onnx", "format=tflite"], "format=tflite: must be one of onnx, pt2"),
        (["dst=a.onnx", "opset=18"], "opset=18: must be an integer, at least 19"),
        (["dst=a.onnx", "source=nosuch"], "source=nosuch: no such file or folder"),
        (["dst=."], "dst=.: is a folder; give a file in it"),
        (
            ["dst=a.onnx", "data.tile=64"],
            "data.tile=64: a file does not cut images into tiles; export with data.tile=null",
        ),
        ([], "dst: must be given, for example dst="),
    ],
)
def test_invalid_options_are_refused_and_nothing_is_written(command, detector_file, workplace, arguments, line):
    assert refused(command("export", f"ckpt={detector_file}", *arguments)).startswith(f"error: {line}")
    assert not list(workplace.glob("*.onnx")) + list(workplace.glob("*.pt2"))
