"""Exported files find what the model finds, for heads, backbones, image sizes and batches; others are not written."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.inference import MultiScaleSettings
from cpm_rcnn.inference.export import export, files
from cpm_rcnn.inference.export.onnx_file import OnnxRunner
from cpm_rcnn.inference.export.parity import Comparison, compare, drawn_images, run_batch
from exported_models import BACKBONES, CMM, HEADS, drawn_image, make_detector, three_sizes


# With the test of the command (CMM, ISM and RSM on a tiny backbone, continuous coordinates), each head, family of
# backbones and box convention at least once. benchmarks/export.py has all combinations of heads and backbones.
@pytest.mark.parametrize(
    ("head", "backbone", "convention"),
    [
        ("CPM with fusion", "ResNet", "detectron2"),
        ("cascade", "deformable ResNeXt", "inclusive"),
        ("faster", "ResNeXt", "mmdetection"),
        ("faster", "timm", "torchvision"),
    ],
)
def test_an_onnx_file_finds_what_the_model_finds_for_all_sizes_and_batches(head, backbone, convention, tmp_path):
    options = {**HEADS[head], "backbone": BACKBONES[backbone], "convention": convention}
    detector = make_detector(sizes={"short_side": None}, **options)
    compared = export(detector, tmp_path / "a.onnx", images=three_sizes())
    assert compared.images == 3
    assert compared.detections > 10
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    again = compare(detector.model, OnnxRunner(tmp_path / "a.onnx"), three_sizes())
    assert again == compared


PT2_ALONE = """
import json, sys
import torch, torchvision
extra = {"detector.json": ""}
detect = torch.export.load(sys.argv[1], extra_files=extra).module()
images, sizes = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(detect(images, sizes), sys.argv[3])
assert not any(name.startswith("cpm_rcnn") for name in sys.modules)
print(extra["detector.json"])
"""


def test_a_pt2_file_finds_what_the_model_finds_in_a_process_without_this_package(tmp_path):
    detector = make_detector(sizes={"short_side": None, "max_size": 96}, stages=CMM[:1])
    assert export(detector, tmp_path / "a.pt2", "pt2", images=three_sizes()).detections > 10
    image = drawn_image(64, 96)
    torch.save((image[None], torch.tensor([[64, 96]])), tmp_path / "inputs.pt")
    arguments = [tmp_path / "a.pt2", tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    ran = subprocess.run(
        [sys.executable, "-c", PT2_ALONE, *arguments], capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    found = torch.load(tmp_path / "outputs.pt")
    assert compare(detector.model, lambda *inputs: found, {"image": image}).detections > 3
    about = json.loads(ran.stdout)
    assert about["classes"] == ["cat", "dog"]
    assert about["category_ids"] == [3, 8]
    assert (about["short_side"], about["max_size"], about["multiple"]) == (None, 96, 32)
    assert about["model"]["score_threshold"] == 0.2
    assert about["score_thresholds"] == {}


class Model:
    """Stands for a model or a file with given detections in each image."""

    def __init__(self, boxes, scores, labels):
        self.found = {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}

    def __call__(self, images):
        return [self.found for _ in images]

    def run(self, images, sizes):
        columns = [torch.cat([column] * len(images)) for column in self.found.values()]
        return *columns, torch.full((len(images),), len(self.found["scores"]))


BOXES, SCORES, LABELS = [[0.0, 0, 9, 9], [5.0, 5, 9, 9]], [0.9, 0.9], [1, 2]
TWO = {"a": drawn_image(32, 32), "b": drawn_image(64, 32)}


@pytest.mark.parametrize(
    ("boxes", "scores", "labels", "message"),
    [
        ([[0.0, 0, 9, 9.06], BOXES[1]], SCORES, LABELS, "a: detection 1 of 2 (label 1, score 0.9000) differs by 0.06"),
        (BOXES, [0.9, 0.8998], LABELS, "a: detection 2 of 2 (label 2, score 0.9000) differs by 0 pixels and 0.0002"),
        (BOXES, SCORES, [1, 1], "a: detection 2 of 2 (label 2, score 0.9000) is missing in the file"),
        (BOXES[:1], SCORES[:1], LABELS[:1], "a: detection 2 of 2 (label 2, score 0.9000) is missing in the file"),
        ([*BOXES, BOXES[0]], [*SCORES, 0.9], [*LABELS, 1], "a: the file has 3 detections, the model 2"),
    ],
)
def test_a_difference_is_refused_with_the_image_and_the_size_of_the_difference(boxes, scores, labels, message):
    with pytest.raises(UserError) as caught:
        compare(Model(BOXES, SCORES, LABELS), Model(boxes, scores, labels).run, TWO)
    assert str(caught.value).startswith(message)


def test_a_file_with_fewer_of_several_equal_detections_is_refused():
    with pytest.raises(UserError, match=r"a: detection 2 of 2 .* is one of several that are equal"):
        compare(Model([BOXES[0]] * 2, SCORES, [1, 1]), Model(BOXES[:1], SCORES[:1], LABELS[:1]).run, TWO)


def test_detections_of_almost_equal_scores_may_be_in_another_order():
    other = Model(BOXES[::-1], [0.9, 0.89995], LABELS[::-1])
    compared = compare(Model(BOXES, SCORES, LABELS), other.run, TWO)
    assert compared.images == 2
    assert compared.detections == 4
    assert compared.box == 0
    assert compared.score == pytest.approx(5e-5, rel=1e-2)


def test_images_without_detections_do_not_count_as_a_comparison():
    nothing = Model([[0.0] * 4], [0.5], [1])
    nothing.found = {name: column[:0] for name, column in nothing.found.items()}
    with pytest.raises(UserError, match=r"no detections in 2 images, so nothing was compared"):
        compare(nothing, nothing.run, TWO)


def test_images_of_a_batch_are_padded_to_the_same_multiple_of_32():
    seen = []

    def run(images, sizes):
        seen.append((images, sizes))
        return torch.zeros(3, 4), torch.zeros(3), torch.ones(3, dtype=torch.int64), torch.tensor([1, 2])

    found = run_batch(run, [drawn_image(33, 20), drawn_image(20, 64)])
    ((images, sizes),) = seen
    assert images.shape == (2, 3, 64, 64)
    assert sizes.tolist() == [[33, 20], [20, 64]]
    assert torch.equal(images[1, :, :20], drawn_image(20, 64))
    assert [len(each["scores"]) for each in found] == [1, 2]


def test_drawn_images_have_three_sizes_after_they_are_resized():
    detector = make_detector(sizes={"short_side": 64, "max_size": 96})
    assert len({detector.resize(image).shape for image in drawn_images(detector).values()}) == 3


@pytest.mark.parametrize("side", [64, 150, 400])
def test_pillow_resizes_as_the_detector_does_within_two_levels(side):
    drawn = drawn_image(180, 240)
    noise = torch.randint(0, 256, drawn.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for image in (drawn, noise):
        expected = make_detector(sizes={"short_side": side}).resize(image)
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
        resized = np.asarray(pixels.resize(expected.shape[:0:-1], Image.Resampling.BILINEAR))
        difference = np.abs(resized.astype(int) - expected.permute(1, 2, 0).numpy())
        assert difference.max() <= 2
        assert difference.mean() < 0.1


@pytest.fixture
def without_exporters(monkeypatch):
    """The exporters, which take seconds, write a few bytes; returns the error that the comparison then raises."""
    errors = []

    def compared(*args):
        if errors:
            raise errors[0]
        return Comparison(1, 1, 0.0, 0.0)

    monkeypatch.setattr(files, "trace", lambda model, replacements=None: None)
    monkeypatch.setattr(files, "write_onnx", lambda program, path, metadata, opset: path.write_bytes(b"new"))
    monkeypatch.setattr(files, "_RUNNERS", {"onnx": lambda path: None, "pt2": lambda path: None})
    monkeypatch.setattr(files, "compare", compared)
    return errors


def test_a_file_whose_detections_differ_is_not_written_and_an_older_one_stays(without_exporters, tmp_path):
    detector = make_detector()
    (tmp_path / "a.onnx").write_bytes(b"old")
    without_exporters.append(UserError("drawn image 1: detection 1 differs"))
    with pytest.raises(UserError, match="drawn image 1"):
        export(detector, tmp_path / "a.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.onnx": b"old"}
    without_exporters.clear()
    export(detector, tmp_path / "a.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.onnx": b"new"}


def test_an_error_of_the_exporters_is_one_line_and_nothing_is_written(without_exporters, tmp_path, monkeypatch):
    def trace(model, replacements=None):
        raise RuntimeError("Could not guard on u0 == 1\nmore lines")

    monkeypatch.setattr(files, "trace", trace)
    with pytest.raises(UserError, match=r"^torch cannot export this model as format=onnx: Could not guard on u0 == 1$"):
        export(make_detector(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_onnxruntime_cannot_run_is_refused_and_not_written(without_exporters, tmp_path, monkeypatch):
    def load(path):
        raise RuntimeError("Could not find an implementation for RoiAlign(22)\nmore lines")

    monkeypatch.setattr(files, "_RUNNERS", {"onnx": load, "pt2": load})
    with pytest.raises(
        UserError, match=r"cannot be run with opset=22; try opset=19: Could not find .* RoiAlign\(22\)$"
    ):
        export(make_detector(), tmp_path / "a.onnx", opset=22)
    assert not list(tmp_path.iterdir())


def test_what_a_file_cannot_do_is_refused(without_exporters, tmp_path, monkeypatch):
    detector = make_detector()
    for name, value in (("format", "tflite"), ("opset", 18)):
        with pytest.raises(ArgumentError, match=f"^{name}={value}: must be"):
            export(detector, tmp_path / "a.onnx", **{name: value})
    with pytest.raises(ArgumentError, match=r"^tile=64: a file does not cut images into tiles"):
        export(make_detector(sizes={"short_side": 64, "tile": 64}), tmp_path / "a.onnx")
    with pytest.raises(ArgumentError, match=r"^multi_scale: a file tests at one scale"):
        export(make_detector(sizes={"short_side": 64, "multi_scale": MultiScaleSettings()}), tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"^the weights were converted to bfloat16, but a file has float32 weights"):
        export(make_detector().optimize(torch.bfloat16), tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript is not installed; pip install 'cpm-rcnn\[export\]'"):
        export(detector, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
