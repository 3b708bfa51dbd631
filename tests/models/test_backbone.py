import builtins

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.backbones import BackboneSettings, build_body
from cpm_rcnn.models.fpn import FPNBackbone
from cpm_rcnn.ops import DeformConv2dPack

TIMM = "tf_efficientnet_lite0"


def make_body(name, **settings):
    torch.manual_seed(0)
    return build_body(BackboneSettings(name, **settings))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("tiny", (32, 64, 96, 128)),
        ("resnet18", (64, 128, 256, 512)),
        ("resnet50", (256, 512, 1024, 2048)),
        (TIMM, (24, 40, 112, 320)),
    ],
)
def test_features_have_strides_4_to_32_and_the_declared_channels(name, channels):
    body = make_body(name)
    assert body.channels == channels
    with torch.no_grad():
        features = body(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in features] == [(c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32))]


def test_pyramid_has_five_levels_of_equal_width_and_p6_subsamples_p5():
    backbone = FPNBackbone(make_body("tiny"), 24)
    with torch.no_grad():
        pyramid = backbone(torch.randn(2, 3, 64, 128))
    assert list(pyramid) == ["p2", "p3", "p4", "p5", "p6"]
    assert [tuple(x.shape) for x in pyramid.values()] == [(2, 24, 64 // s, 128 // s) for s in (4, 8, 16, 32, 64)]
    assert torch.equal(pyramid["p6"], pyramid["p5"][:, :, ::2, ::2])


def strides_of(body):
    return [(block.conv1.stride[0], block.conv2.stride[0]) for stage in body.layers for block in stage]


def test_stride_is_on_the_3x3_convolution_or_for_caffe_on_the_1x1():
    caffe_body = make_body("resnet50", input_format="caffe")
    usual, caffe = strides_of(make_body("resnet50")), strides_of(caffe_body)
    assert caffe == [(second, first) for first, second in usual]
    assert [usual[i] for i in (0, 3, 7, 13)] == [(1, 1), (1, 2), (1, 2), (1, 2)]
    with torch.no_grad():
        features = caffe_body(torch.randn(1, 3, 64, 64))
    assert [x.shape[-1] for x in features] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", {}),
        ("resnext50_32x4d", {}),
        ("resnet", {"layout": {"blocks": [1, 1, 1, 1], "groups": 2}}),
        ("resnet", {"layout": {"blocks": [1, 1, 1, 1], "bottleneck": False}}),
    ],
    ids=["basic blocks", "resnext", "custom resnext", "custom basic blocks"],
)
def test_stride_stays_on_the_3x3_convolution_unless_bottlenecks_are_plain(name, settings):
    with torch.device("meta"):
        caffe, usual = make_body(name, input_format="caffe", **settings), make_body(name, **settings)
    assert strides_of(caffe) == strides_of(usual)


def test_layout_gives_a_custom_resnet():
    body = make_body("resnet", layout={"blocks": [1, 2, 1, 1], "groups": 4, "width_per_group": 8})
    assert [len(stage) for stage in body.layers] == [1, 2, 1, 1]
    assert body.layers[0][0].conv2.groups == 4
    assert body.layers[0][0].conv2.out_channels == 32
    with torch.no_grad():
        features = body(torch.randn(1, 3, 64, 64))
    assert tuple(x.shape[1] for x in features) == body.channels


def test_deformable_layers_are_the_3x3_of_c3_to_c5_and_start_as_plain_convolutions():
    layout = {"blocks": [1, 2, 1, 1]}
    plain = make_body("resnet", layout=layout).eval()
    deformable = make_body("resnet", layout=layout, deformable_stages=(3, 4, 5)).eval()
    kinds = [isinstance(block.conv2, DeformConv2dPack) for stage in deformable.layers for block in stage]
    assert kinds == [False] + [True] * 4
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("conv_offset" in name for name in missing)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for with_offsets, without in zip(deformable(images), plain(images)):
            torch.testing.assert_close(with_offsets, without, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages_get_no_gradient_and_the_others_do(frozen):
    body = make_body("resnet18", frozen_stages=frozen)
    if frozen < 5:
        sum(x.sum() for x in body(torch.randn(1, 3, 32, 32))).backward()
    for i, part in enumerate([body.stem, *body.layers]):
        assert {p.requires_grad for p in part.parameters()} == {i >= frozen}
        assert {p.grad is not None for p in part.parameters()} == {i >= frozen}


def frozen_parts(body):
    return {".".join(name.split(".")[:2]) for name, p in body.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("name", "frozen"), [("resnet18", {"stem.conv1", "layers.0"}), (TIMM, {"net.conv_stem"})], ids=["resnet", "timm"]
)
def test_first_stages_are_frozen_by_default_only_with_weights(name, frozen):
    assert frozen_parts(make_body(name, weights="some.pth")) == frozen
    assert frozen_parts(make_body(name)) == set()
    assert frozen_parts(make_body(name, weights="some.pth", frozen_stages=0)) == set()


def test_stem_of_a_timm_model_can_be_frozen():
    body = make_body(TIMM, frozen_stages=1)
    assert {name for name, p in body.named_parameters() if not p.requires_grad} == {"net.conv_stem.weight"}


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", TIMM])
def test_statistics_of_batch_norm_do_not_change_in_training(name):
    body = make_body(name).train()
    assert not [layer for layer in body.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    before = {key: value.clone() for key, value in body.state_dict().items()}
    with torch.no_grad():
        body(torch.randn(2, 3, 32, 32) * 10)
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())


def test_state_dict_contains_the_frozen_batch_norm():
    body = make_body("resnet18")
    norms = [name for name, layer in body.named_modules() if isinstance(layer, FrozenBatchNorm2d)]
    assert len(norms) == 20
    assert all(f"{name}.running_var" in body.state_dict() for name in norms)


def test_timm_model_with_channels_last_outputs_gives_channels_first():
    body = make_body("mambaout_femto").eval()
    assert body.channels_last
    with torch.inference_mode():
        shapes = [tuple(feature.shape[1:]) for feature in body(torch.zeros(1, 3, 64, 64))]
    assert shapes == [(channels, 16 // 2**k, 16 // 2**k) for k, channels in enumerate(body.channels)]


@pytest.mark.parametrize(
    ("name", "weights"),
    [("resnet50", "IMAGENET1K_V1"), ("resnet18", "missing.pth"), (TIMM, "pretrained"), ("tiny", None)],
)
def test_constructor_reads_no_file_even_if_weights_are_set(monkeypatch, name, weights):
    make_body(name)  # imports what is imported on first use

    def fail(*arguments, **keywords):
        raise AssertionError(f"a constructor read {arguments}")

    for module, function in (
        (builtins, "open"),
        (torch, "load"),
        (torch.hub, "load_state_dict_from_url"),
        (safetensors, "safe_open"),
        (safetensors.torch, "load_file"),
    ):
        monkeypatch.setattr(module, function, fail)
    body = make_body(name, weights=weights)
    monkeypatch.undo()
    assert sum(p.numel() for p in body.parameters()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet51"}, r"^name=resnet51: .*resnet50.*not a model of timm"),
        ({"name": "vit_tiny_patch16_224"}, r"^name=vit_tiny_patch16_224: .*strides"),
        ({"name": f"{TIMM}.no_such_tag"}, rf"^name={TIMM}\.no_such_tag: .*tag"),
        ({"name": "tiny", "weights": "x.pth"}, "^name=tiny: "),
        ({"name": "tiny", "frozen_stages": 2}, "^name=tiny: "),
        ({"name": "tiny", "deformable_stages": [5]}, r"^deformable_stages=\[5\]: .*not tiny"),
        ({"name": TIMM, "deformable_stages": [5]}, rf"^deformable_stages=\[5\]: .*not {TIMM}"),
        ({"name": "resnet18", "deformable_stages": [5]}, r"^deformable_stages=\[5\]: resnet18 has no bottlenecks"),
        ({"name": "resnet50", "deformable_stages": [2]}, r"^deformable_stages=2: must be one of 3, 4, 5"),
        ({"name": TIMM, "frozen_stages": 2}, r"^frozen_stages=2: must be one of 0, 1"),
        ({"name": "resnet18", "frozen_stages": 6}, r"^frozen_stages=6: "),
        ({"name": "resnet18", "frozen_stages": -1}, r"^frozen_stages=-1: "),
        ({"name": "resnet50", "layout": {"blocks": [1, 1, 1, 1]}}, "^name=resnet50: layout"),
        ({"name": "resnet"}, "^name=resnet: layout"),
        ({"name": "resnet", "layout": {"blocks": [1, 1]}}, r"^layout\.blocks=\[1, 1\]: must be a list of 4"),
        ({"name": "resnet", "layout": {"block": [1, 1, 1, 1]}}, "^layout: unknown key block"),
        (
            {"name": "resnet", "layout": {"blocks": [1, 1, 1, 1], "groups": 32, "bottleneck": False}},
            r"^layout\.bottleneck=False: ",
        ),
    ],
)
def test_invalid_combination_is_a_user_error_that_names_the_argument(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        build_body(BackboneSettings(**arguments))


def test_order_and_repetition_of_deformable_stages_have_no_meaning():
    settings = BackboneSettings("resnet50", deformable_stages=[5, 3, 5])
    assert settings.deformable_stages == (3, 5)
    assert settings == BackboneSettings("resnet50", deformable_stages=(3, 5))
