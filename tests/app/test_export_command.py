"""``export``: the ONNX file of a trained model, run by the script of docs/export.md in a process without torch."""

import json
import re
import subprocess
import sys
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import refused

from cpm_rcnn import load
from cpm_rcnn.data.shapes import render

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "run_onnx.py"
RUN_ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
assert not {"torch", "torchvision", "cpm_rcnn"} & set(sys.modules)
"""
ROTATED = 6  # in EXIF: the picture must be turned by 90 degrees
MIN_SCORE = 0.05


@pytest.fixture
def sharpened(checkpoint, tmp_path):
    """The trained checkpoint with larger weights in the last layers.

    After the few steps of the test's run, all cells of a heatmap are almost equal, and rounding would decide which one
    is the maximum.
    """
    content = torch.load(checkpoint, weights_only=True)
    for ending, factor in (("deconvs.3.weight", 300), ("predictor.weight", 50)):
        layers = [name for name in content["state_dict"] if name.endswith(ending)]
        assert len(layers) == 3  # of the grid stages; of the classifier, ISM and RSM
        for name in layers:
            content["state_dict"][name] *= factor
    torch.save(content, tmp_path / "sharpened.ckpt")
    return tmp_path / "sharpened.ckpt"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A picture at the size of the test, 192 x 256, and one that is rotated and resized."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = Image.fromarray(render(np.random.default_rng(0))[0])
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    drawn.resize((256, 192)).save(folder / "same.png")
    drawn.resize((450, 320)).save(folder / "larger.png", exif=exif)
    return folder


def run_alone(model, picture, *min_score):
    """What the script finds, without torch or this package in its process: classes, scores and boxes."""
    arguments = [sys.executable, "-c", RUN_ALONE, SCRIPT, model, picture, *map(str, min_score)]
    ran = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    names, scores, boxes = ([each[key] for each in found] for key in ("class", "score", "box"))
    return names, torch.tensor(scores), torch.tensor(boxes)


def test_onnxruntime_alone_finds_what_the_trained_model_finds(command, sharpened, pictures, tmp_path):
    target = tmp_path / "files" / "detector.onnx"
    answer = command("export", f"ckpt={sharpened}", f"dst={target}", "detector.score_threshold=0.2")
    assert answer.status == 0, answer.err
    summary, path = answer.out.splitlines()
    assert re.fullmatch(
        r"\d+ detections in 3 images; largest differences from the model: .* pixels, .* in scores", summary
    )
    assert path == str(target)
    assert [file.name for file in target.parent.iterdir()] == ["detector.onnx"]
    # Pillow and torchvision resize slightly differently, and the box is in pixels of the larger image.
    for name, pixels, score in (("same.png", 0.05, 1e-4), ("larger.png", 0.5, 0.02)):
        (expected,) = load(sharpened, score_threshold=0.2).detect(pictures / name, score_threshold=MIN_SCORE)
        names, scores, boxes = run_alone(target, pictures / name, MIN_SCORE)
        assert len(expected) > 3
        assert names == expected.names
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=score)
        torch.testing.assert_close(boxes, expected.boxes, rtol=0, atol=pixels)
    detector = load(sharpened, score_threshold=0.2)
    least = [0.3 if score == inf else score for score in detector.thresholds("best_f1")]
    (expected,) = detector.detect(pictures / "same.png", score_threshold=least)
    assert run_alone(target, pictures / "same.png")[0] == expected.names
    again = refused(command("export", f"ckpt={sharpened}", f"dst={target}"))
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
def test_invalid_options_are_refused_and_nothing_is_written(command, checkpoint, workplace, arguments, line):
    assert refused(command("export", f"ckpt={checkpoint}", *arguments)).startswith(f"error: {line}")
    assert not list(workplace.glob("*.onnx")) + list(workplace.glob("*.pt2"))
