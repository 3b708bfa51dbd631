"""Frozen BatchNorm folded into the convolutions, in training and once for inference."""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.models.backbones import BackboneSettings, build_body
from cpm_rcnn.models.backbones.frozen_norm import conv_norm, fold_once
from cpm_rcnn.ops import DeformConv2dPack

SMALL_RESNEXT = {"blocks": [1, 2, 1, 1], "groups": 4, "width_per_group": 8}
BODIES = {
    "tiny": {"name": "tiny"},
    "r18": {"name": "resnet18"},
    "r50": {"name": "resnet50"},
    "r50 caffe": {"name": "resnet50", "input_format": "caffe"},
    "small x101_dcn": {"name": "resnet", "layout": SMALL_RESNEXT, "deformable_stages": [3, 4, 5]},
    "timm": {"name": "tf_efficientnet_lite0"},
    "timm resnet": {"name": "resnet18d"},
}


def randomize(module):
    """Give BatchNorm random statistics, and convolutions that predict offsets random weights."""
    for name, layer in module.named_modules():
        if "FrozenBatchNorm" in type(layer).__name__:
            layer.weight.copy_(torch.rand(len(layer.weight)) + 0.5)
            layer.bias.copy_(torch.randn(len(layer.bias)) * 0.2)
            layer.running_mean.copy_(torch.randn(len(layer.bias)) * 0.2)
            layer.running_var.copy_(torch.rand(len(layer.bias)) + 0.5)
        if name.endswith("conv_offset"):
            nn.init.normal_(layer.weight, std=0.02)
    return module


def make_body(name, dtype=torch.float64):
    torch.manual_seed(0)
    return randomize(build_body(BackboneSettings(**BODIES[name]))).to(dtype)


def convolutions():
    yield "conv", nn.Conv2d(8, 12, 3, 2, 1, bias=False)
    yield "conv with bias", nn.Conv2d(8, 12, 3, 2, 1)
    yield "grouped 1x1", nn.Conv2d(8, 12, 1, groups=4, bias=False)
    for modulated in (False, True):
        layer = DeformConv2dPack(8, 12, 3, 1, 1, groups=2, bias=modulated, modulated=modulated)
        nn.init.normal_(layer.conv_offset.weight, std=0.1)
        yield f"deformable v{1 + modulated}", layer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", [kind for kind, _ in convolutions()])
def test_output_and_gradients_are_those_of_the_convolution_and_the_batch_norm(kind, dtype, tolerance):
    torch.manual_seed(0)
    conv = dict(convolutions())[kind].to(dtype)
    norm = randomize(FrozenBatchNorm2d(12)).to(dtype)
    x = torch.randn(2, 8, 9, 11, dtype=dtype, requires_grad=True)
    wanted = [x, *conv.parameters()]
    expected, found = norm(conv(x)), conv_norm(x, conv, norm)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(torch.autograd.grad(found, wanted, grad), torch.autograd.grad(expected, wanted, grad)):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("kind", [kind for kind, _ in convolutions()])
def test_a_convolution_folded_once_gives_the_same_output_without_its_batch_norm(kind):
    torch.manual_seed(0)
    conv = dict(convolutions())[kind].double()
    norm = randomize(FrozenBatchNorm2d(12)).double()
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    with torch.no_grad():
        expected = norm(conv(x))
        fold_once(conv, norm)
        torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)


def test_batch_norm_that_is_trained_is_not_folded():
    conv, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    conv_norm(torch.randn(2, 3, 5, 5), conv, norm).sum().backward()
    assert norm.weight.grad is not None
    assert norm.num_batches_tracked == 1


def unfolded(monkeypatch):
    """Let ResNets run each BatchNorm as a layer of its own."""
    monkeypatch.setattr("cpm_rcnn.models.backbones.resnet.conv_norm", lambda x, conv, norm: norm(conv(x)))


@pytest.mark.parametrize("name", ["r18", "r50", "r50 caffe", "small x101_dcn"])
def test_a_resnet_has_the_features_and_gradients_of_separate_layers(name, monkeypatch):
    body = make_body(name)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)

    def features_and_gradients():
        features = body(images)
        loss = sum((x * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)[:, None, None]).mean() for x in features)
        return [*features, *torch.autograd.grad(loss, list(body.parameters()))]

    found = features_and_gradients()
    unfolded(monkeypatch)
    for mine, theirs in zip(found, features_and_gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["r18", "small x101_dcn"])
def test_the_features_are_those_of_torchvision_s_blocks(name):
    body = make_body(name)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        found, x = body(images), body.stem(images)
        for stage, features in zip(body.layers, found):
            for block in stage:
                x = type(block).__base__.forward(block, x)
            torch.testing.assert_close(features, x, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", BODIES)
def test_features_are_the_same_after_fold_norms(name):
    body = make_body(name).eval()
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = body(images)
        fold(body)
        for mine, theirs in zip(body(images), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12 * theirs.abs().max().item())
    assert not [layer for layer in body.modules() if "FrozenBatchNorm" in type(layer).__name__]
    state = {key: value.clone() for key, value in body.state_dict().items()}
    fold(body)
    assert state.keys() == body.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in body.state_dict().items())


def fold(body):
    if hasattr(body, "fold_norms"):
        body.fold_norms()


def test_a_fold_is_bit_equal_to_the_product_in_each_step():
    body = make_body("r18", torch.float32).eval()
    images = torch.randn(1, 3, 64, 64)
    folded = copy.deepcopy(body)
    folded.fold_norms()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(body(images), folded(images), strict=True))


@pytest.mark.parametrize("name", ["r18", "small x101_dcn"])
def test_names_of_the_state_dict_are_those_of_torchvision(name):
    body = make_body(name)
    names = set(body.state_dict())
    block = {"conv1.weight", *(f"bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var"))}
    assert {f"stem.{part}" for part in block} <= names
    assert {f"layers.1.0.{part}" for part in block} <= names
    assert "layers.1.0.downsample.1.running_var" in names
    assert not [each for each in names if each.endswith(("conv1.bias", "downsample.0.bias"))]


class TwoReaders(nn.Module):
    """A network in which the output of a convolution has a reader besides its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = FrozenBatchNorm2d(4)

    def forward(self, images):
        x = self.conv(images)
        return [self.norm(x) + x]


def test_a_timm_network_that_would_change_is_not_folded():
    body = make_body("timm")
    body.net = randomize(TwoReaders()).double()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = body(images)
        body.fold_norms()
        assert torch.equal(body(images)[0], expected[0])
    assert body.net.conv.weight.requires_grad
