"""Detector.optimize: the same detections from weights that are only for inference."""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import cpm_rcnn
from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.inference import Detector, MultiScaleSettings
from cpm_rcnn.models.build import build_detector
from small_models import CATEGORIES, SMALL, TwoImages, small_module, small_trainer, write_trained

R18 = {**SMALL, "backbone": {"name": "resnet18"}}
DCN = {
    "name": "resnet",
    "layout": {"blocks": [1, 1, 1, 1], "groups": 4, "width_per_group": 8},
    "deformable_stages": [3, 4, 5],
}
IMAGES = [
    torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(height))
    for height, width in ((70, 110), (64, 64))
]


def make_detector(multi_scale=None, **model):
    """A detector with random weights and BatchNorm, whose scores differ."""
    torch.manual_seed(0)
    net = build_detector(num_classes=2, **{**R18, **model}).eval()
    for name, layer in net.named_modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.weight.copy_(torch.rand(len(layer.weight)) * 0.5 + 0.4)
            layer.bias.copy_(torch.randn(len(layer.bias)) * 0.2)
            layer.running_mean.copy_(torch.randn(len(layer.bias)) * 0.2)
            layer.running_var.copy_(torch.rand(len(layer.bias)) + 0.5)
        if name.endswith("conv_offset"):
            nn.init.normal_(layer.weight, std=0.02)
    nn.init.normal_(net.head.classifier.predictor.weight, std=1.0)
    nn.init.constant_(net.head.ism.predictor.bias, 0.5)
    return Detector(net, CATEGORIES, short_side=64, max_size=96, multi_scale=multi_scale)


def assert_close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) == len(theirs) > 0
        assert torch.equal(mine.labels, theirs.labels)
        torch.testing.assert_close(mine.boxes, theirs.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(mine.scores, theirs.scores, rtol=0, atol=1e-5)


def state_of(detector):
    return {name: value.clone() for name, value in detector.model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(a[name].dtype is b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "backbone",
    [{"name": "tiny"}, {"name": "resnet18"}, DCN, {"name": "tf_efficientnet_lite0"}],
    ids=lambda b: b["name"],
)
def test_detections_in_float32_are_the_same_and_no_batch_norm_is_left(backbone):
    detector = make_detector(backbone=backbone)
    expected = detector.detect(IMAGES, details=True)
    assert detector.optimize() is detector
    assert_close(detector.detect(IMAGES, details=True), expected)
    assert not [layer for layer in detector.model.modules() if "FrozenBatchNorm" in type(layer).__name__]


def test_the_multi_scale_test_uses_the_optimized_model():
    detector = make_detector(MultiScaleSettings(scales=[0.75, 1.0]))
    expected = detector.detect(IMAGES)
    assert_close(detector.optimize().detect(IMAGES), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_call_changes_nothing(dtype):
    detector = make_detector().optimize(dtype)
    before, expected = state_of(detector), detector.detect(IMAGES)
    detector.optimize(dtype)
    assert same_state(state_of(detector), before)
    assert_close(detector.detect(IMAGES), expected)


def test_a_checkpoint_is_loaded_and_then_optimized(tmp_path):
    module = write_trained(tmp_path / "last.ckpt", small_module(backbone={"name": "resnet18"}))
    expected = module.detector.detect(IMAGES)
    assert_close(cpm_rcnn.load(tmp_path / "last.ckpt").optimize().detect(IMAGES), expected)


def test_bfloat16_gives_the_detections_of_autocast_with_weights_converted_once():
    detector = make_detector(backbone={"name": "tiny"})
    with torch.autocast("cpu", torch.bfloat16):
        expected = detector.detect(IMAGES, details=True)
    found = detector.optimize(torch.bfloat16).detect(IMAGES, details=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) > 0
        assert all(torch.equal(value, theirs.to_dict()[name]) for name, value in mine.to_dict().items())


@pytest.mark.parametrize("backbone", [{"name": "resnet18"}, DCN], ids=lambda b: b["name"])
def test_bfloat16_is_used_by_convolutions_and_linear_layers_only(backbone):
    detector = make_detector(backbone=backbone).optimize(torch.bfloat16)
    for layer in detector.model.modules():
        cast = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, cpm_rcnn.ops.DeformConv2dPack))
        for value in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
            if value.is_floating_point():
                assert value.dtype is (torch.bfloat16 if cast else torch.float32)
    for found in detector.detect(IMAGES):
        assert found.boxes.dtype is found.scores.dtype is torch.float32


@pytest.mark.parametrize("backbone", [{"name": "resnet18"}, DCN], ids=lambda b: b["name"])
def test_the_pyramid_in_bfloat16_is_that_of_float32_to_two_percent(backbone):
    # Random heads would turn small differences into other boxes; trained ones are in tests/models/test_overfit.py.
    model = make_detector(backbone=backbone).model
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.backbone(images)
        model.optimize(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.backbone(images)
    for name, level in expected.items():
        assert found[name].dtype is torch.bfloat16
        assert (found[name] - level).norm() < 0.02 * level.norm()


def test_an_optimized_model_is_not_trained():
    module = small_module(backbone={"name": "resnet18"})
    module.detector.optimize()
    module.eval()
    message = r"^the model was optimized for inference and cannot be trained; load the checkpoint again$"
    with pytest.raises(UserError, match=message):
        module.model.train()
    assert not module.model.training
    with pytest.raises(UserError, match=message):
        small_trainer().fit(module, datamodule=TwoImages())
    assert not [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]


def test_detect_can_be_called_in_train_mode_before_and_keeps_eval_mode_after():
    detector = make_detector()
    detector.model.train()
    detector.optimize()
    assert not detector.model.training
    detector.detect(IMAGES)
    assert not detector.model.training


def test_a_copy_of_an_optimized_detector_is_optimized():
    detector = make_detector().optimize()
    twin = copy.deepcopy(detector)
    assert_close(twin.detect(IMAGES), detector.detect(IMAGES))
    with pytest.raises(UserError, match="optimized"):
        twin.model.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16}, r"^dtype=torch\.float16: must be one of torch\.float32, torch\.bfloat16$"),
        ({"dtype": "bf16"}, r"^dtype=bf16: must be one of torch\.float32, torch\.bfloat16$"),
        ({"compile": 1}, r"^compile=1: must be true or false$"),
    ],
)
def test_invalid_arguments_change_nothing(arguments, message):
    detector = make_detector(backbone={"name": "tiny"})
    before = state_of(detector)
    with pytest.raises(ArgumentError, match=message):
        detector.optimize(**arguments)
    assert same_state(state_of(detector), before)
    detector.model.train()


def test_rounded_weights_cannot_become_float32_again():
    detector = make_detector(backbone={"name": "tiny"}).optimize().optimize(torch.bfloat16)
    with pytest.raises(ArgumentError, match=r"^dtype=torch\.float32: the weights were converted to bfloat16"):
        detector.optimize()


def test_compile_compiles_the_backbone_and_keeps_the_names_of_the_weights(monkeypatch):
    calls = []

    def compile_eagerly(function, *arguments, **options):
        def compiled(inputs):
            calls.append(inputs)
            return function(inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    detector = make_detector()
    plain = copy.deepcopy(detector).optimize()
    detector.optimize(compile=True)
    assert same_state(state_of(detector), state_of(plain))
    assert_close(detector.detect(IMAGES), plain.detect(IMAGES))
    batches = [each.shape for each in calls if isinstance(each, torch.Tensor) and each.shape[1] == 3]
    assert batches == [(1, 3, 64, 96), (1, 3, 64, 64)]
