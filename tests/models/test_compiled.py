"""compile_layers: the same losses, gradients and detections, and few compilations."""

import pytest
import torch
from inputs import make_target, random_image

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.build import build_detector

SMALL = {
    "fpn_channels": 16,
    "mlp_channels": 16,
    "point_channels": 4,
    "grid_convs": 2,
    "stages": [{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0}],
    "fusion": True,
    "ignore_border_anchors": False,
    "proposals_train": 30,
    "proposals_test": 20,
    "score_threshold": 0.05,
}
TARGETS = [make_target((10, 20, 60, 60), (50, 10, 90, 40), labels=[1, 2])]


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """Trace the layers as for compilation, forward and backward, and run them without generated code."""
    torch.compiler.reset()
    compile_module = torch.nn.Module.compile

    def trace(module, mode, **options):
        compile_module(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    yield
    torch.compiler.reset()


def make_detector():
    torch.manual_seed(0)
    backbone = {"name": "resnet", "layout": {"blocks": [1, 1, 1, 1], "bottleneck": False}, "frozen_stages": 0}
    return build_detector(backbone, 3, **SMALL)


def step(model, image):
    torch.manual_seed(1)
    losses = model.train()([image], TARGETS)
    torch.stack(list(losses.values())).sum().backward()
    return losses


def test_compiled_layers_give_the_same_losses_gradients_and_detections():
    plain, compiled = make_detector(), make_detector()
    compiled.compile_layers("reduce-overhead")
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for size in ((64, 96), (96, 64)):
        expected, found = step(plain, random_image(*size)), step(compiled, random_image(*size))
        torch.testing.assert_close(found, expected)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    with torch.no_grad():
        expected, found = (model.eval()([random_image(64, 96)]) for model in (plain, compiled))
    assert len(expected[0]["scores"]) > 0
    torch.testing.assert_close(found, expected)


def test_a_third_image_size_compiles_nothing():
    model = make_detector()
    model.compile_layers("max")
    compilations = []
    # A level of one cell compiles once more. Beyond 20480 values, torch may choose another convolution.
    for size in ((128, 192), (192, 128), (160, 160)):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        step(model, random_image(*size))
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert compilations[0] > 0
    assert compilations[2] == 0


def test_another_mode_is_refused():
    with pytest.raises(ArgumentError, match="reduce-overhead"):
        make_detector().compile_layers("fast")
