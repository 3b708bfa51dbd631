import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model
from torchvision.ops.misc import FrozenBatchNorm2d

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.backbones.build import FPNBackbone, build_body, default_pixel_format
from cpm_rcnn.models.backbones.resnet import ResNet
from cpm_rcnn.ops import DeformConv2dPack

TIMM = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def resnet18():
    """torchvision's own, with statistics and affine parameters unlike the initial ones."""
    torch.manual_seed(0)
    net = get_model("resnet18", weights=None)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net.eval()


def stages_of(net, images):
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    outputs = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        outputs.append(x)
    return outputs


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("tiny", (32, 64, 96, 128)),
        ("resnet18", (64, 128, 256, 512)),
        ("resnet50", (256, 512, 1024, 2048)),
        (TIMM, (24, 40, 112, 320)),
    ],
)
def test_features_have_strides_4_to_32_and_the_promised_channels(name, channels):
    body = build_body(name)
    assert body.channels == channels
    with torch.no_grad():
        features = body(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in features] == [(c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32))]


def test_pyramid_has_five_levels_of_one_width_and_p6_is_every_second_cell_of_p5():
    backbone = FPNBackbone(build_body("tiny"), 24)
    with torch.no_grad():
        pyramid = backbone(torch.randn(2, 3, 64, 128))
    assert list(pyramid) == ["p2", "p3", "p4", "p5", "p6"]
    assert [tuple(x.shape) for x in pyramid.values()] == [(2, 24, 64 // s, 128 // s) for s in (4, 8, 16, 32, 64)]
    assert torch.equal(pyramid["p6"], pyramid["p5"][:, :, ::2, ::2])


def strides_of(body):
    return [(block.conv1.stride[0], block.conv2.stride[0]) for stage in body.layers for block in stage]


def test_stride_stands_on_the_3x3_or_caffe_style_on_the_1x1():
    usual, caffe = strides_of(build_body("resnet50")), strides_of(build_body("resnet50", stride_in_1x1=True))
    assert caffe == [(second, first) for first, second in usual]
    assert [usual[i] for i in (0, 3, 7, 13)] == [(1, 1), (1, 2), (1, 2), (1, 2)]
    with torch.no_grad():
        features = build_body("resnet50", stride_in_1x1=True)(torch.randn(1, 3, 64, 64))
    assert [x.shape[-1] for x in features] == [16, 8, 4, 2]


def test_deformable_layers_are_the_3x3_of_c3_to_c5_and_change_nothing_at_first():
    torch.manual_seed(0)
    plain = build_body("resnet50").eval()
    deformable = build_body("resnet50", deformable_stages=(3, 4, 5)).eval()
    kinds = [isinstance(block.conv2, DeformConv2dPack) for stage in deformable.layers for block in stage]
    assert kinds == [False] * 3 + [True] * 13
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("conv_offset" in name for name in missing)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(deformable(images), plain(images)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages_get_no_gradient_and_the_rest_does(frozen):
    body = build_body("resnet18", frozen_stages=frozen)
    if frozen < 5:
        sum(x.sum() for x in body(torch.randn(1, 3, 32, 32))).backward()
    for i, part in enumerate([body.stem, *body.layers]):
        assert {p.requires_grad for p in part.parameters()} == {i >= frozen}
        assert {p.grad is not None for p in part.parameters()} == {i >= frozen}


def test_stem_and_c2_are_frozen_with_weights_and_nothing_without(resnet18, tmp_path):
    torch.save(resnet18.state_dict(), tmp_path / "r18.pth")
    with_weights, without = build_body("resnet18", str(tmp_path / "r18.pth")), build_body("resnet18")
    assert all(p.requires_grad for p in without.parameters())
    frozen = {
        name.split(".")[0] + name.split(".")[1] for name, p in with_weights.named_parameters() if not p.requires_grad
    }
    assert frozen == {"stemconv1", "layers0"}


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", TIMM])
def test_no_batch_norm_is_left_to_drift(name):
    body = build_body(name).train()
    assert not [layer for layer in body.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    before = {key: value.clone() for key, value in body.state_dict().items()}
    with torch.no_grad():
        body(torch.randn(2, 3, 32, 32) * 10)
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())


@pytest.mark.parametrize("file", ["r18.pth", "r18.safetensors", "wrapped.pth"])
def test_local_file_of_torchvision_weights_gives_torchvisions_features(resnet18, tmp_path, file):
    path = tmp_path / file
    if path.suffix == ".safetensors":
        save_file(resnet18.state_dict(), path)
    else:
        torch.save({"model": resnet18.state_dict()} if file == "wrapped.pth" else resnet18.state_dict(), path)
    body, images = build_body("resnet18", str(path)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(body(images), stages_of(resnet18, images)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_local_file_of_timm_weights_gives_timms_features(tmp_path):
    import timm

    torch.manual_seed(0)
    net = timm.create_model(TIMM, pretrained=False).eval()
    torch.save(net.state_dict(), tmp_path / "lite0.pth")
    body = build_body(TIMM, str(tmp_path / "lite0.pth")).eval()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in body.net.state_dict().items())


def damage(state, how):
    if how == "missing":
        del state["layer1.0.conv1.weight"]
    elif how == "misshapen":
        state["layer1.0.conv1.weight"] = torch.zeros(1)
    else:
        state["layer9.weight"] = torch.zeros(1)
    return state


@pytest.mark.parametrize("how", ["missing", "misshapen", "unexpected"])
def test_file_that_does_not_fit_is_named_with_what_is_wrong(resnet18, tmp_path, how):
    file = tmp_path / "damaged.pth"
    torch.save(damage(dict(resnet18.state_dict()), how), file)
    with pytest.raises(UserError, match=rf"backbone\.weights=.*damaged\.pth: does not fit the model; 1 {how}: layer"):
        build_body("resnet18", str(file))


def test_file_of_another_net_and_file_of_no_weights_are_named(resnet18, tmp_path):
    torch.save(resnet18.state_dict(), tmp_path / "r18.pth")
    with pytest.raises(UserError, match=r"r18\.pth"):
        build_body("resnet50", str(tmp_path / "r18.pth"))
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(UserError, match=rf"backbone\.weights=.*{name}: cannot be read"):
            build_body("resnet18", str(tmp_path / name))


def test_file_that_holds_no_mapping_is_named(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth"):
        build_body("resnet18", str(tmp_path / "list.pth"))


def test_unknown_weights_name_what_is_allowed():
    with pytest.raises(UserError, match=r"backbone\.weights=IMAGENET9: .*IMAGENET1K_V1"):
        build_body("resnet18", "IMAGENET9")
    with pytest.raises(UserError, match=r"backbone\.weights=IMAGENET1K_V1: no such file.*pretrained"):
        build_body(TIMM, "IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "resnet51"}, r"backbone\.name=resnet51: .*resnet50"),
        ({"name": "vit_tiny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"name": "tiny", "weights": "x.pth"}, "backbone.name=tiny"),
        ({"name": "tiny", "frozen_stages": 2}, "backbone.name=tiny"),
        ({"name": "tiny", "deformable_stages": [5]}, "deformable"),
        ({"name": TIMM, "stride_in_1x1": True}, "stride_in_1x1"),
        ({"name": TIMM, "frozen_stages": 2}, r"backbone\.frozen_stages=2"),
        ({"name": "resnet18", "deformable_stages": [5]}, r"backbone\.name=resnet18"),
        ({"name": "resnet50", "deformable_stages": [2]}, r"backbone\.deformable_stages=2"),
        ({"name": "resnet50", "layout": {"blocks": [1, 1, 1, 1]}}, r"backbone\.layout"),
        ({"name": "resnet"}, r"backbone\.layout"),
        ({"name": "resnet", "layout": {"blocks": [1, 1]}}, r"backbone\.layout\.blocks"),
        ({"name": "resnet", "layout": {"block": [1, 1, 1, 1]}}, r"backbone\.layout: unknown key block"),
        ({"name": "resnet18", "stride_in_1x1": True}, r"backbone\.name=resnet18"),
        ({"name": "resnet18", "frozen_stages": 6}, r"backbone\.frozen_stages=6"),
        ({"name": "resnet18", "frozen_stages": -1}, r"backbone\.frozen_stages=-1"),
    ],
)
def test_what_does_not_fit_together_is_the_users_error(arguments, named):
    with pytest.raises(UserError, match=named):
        build_body(**arguments)


def test_timm_stem_can_be_frozen():
    body = build_body(TIMM, frozen_stages=1)
    frozen = {name for name, p in body.named_parameters() if not p.requires_grad}
    assert frozen == {"net.conv_stem.weight"}


def test_pixel_format_is_that_of_the_published_weights():
    assert default_pixel_format("resnet50")["mean"] == (0.485, 0.456, 0.406)
    assert default_pixel_format(TIMM)["mean"] == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="resnet51"):
        default_pixel_format("resnet51")


def test_frozen_batch_norm_keeps_its_parameters_in_the_checkpoint():
    body = build_body("resnet18")
    assert isinstance(body, ResNet)
    norms = [name for name, layer in body.named_modules() if isinstance(layer, FrozenBatchNorm2d)]
    assert len(norms) == 20
    assert all(f"{name}.running_var" in body.state_dict() for name in norms)


def test_timm_model_whose_layers_timm_renames_loads_a_local_file(tmp_path):
    timm = pytest.importorskip("timm")
    file = tmp_path / "convnext.safetensors"
    whole = timm.create_model("convnext_atto", pretrained=False)
    save_file(whole.state_dict(), file)
    body = build_body("convnext_atto", weights=str(file))
    torch.testing.assert_close(body.net.stem_0.weight, whole.stem[0].weight)
    assert not body.net.stem_0.weight.requires_grad
    with pytest.raises(UserError, match=r"convnext\.safetensors"):
        build_body("convnext_femto", weights=str(file))


def test_timm_model_with_channels_last_gives_maps_with_channels_first():
    pytest.importorskip("timm")
    body = build_body("swin_tiny_patch4_window7_224").eval()
    with torch.inference_mode():
        shapes = [tuple(feature.shape[1:]) for feature in body(torch.zeros(1, 3, 224, 224))]
    assert shapes == [(channels, 56 // 2**k, 56 // 2**k) for k, channels in enumerate(body.channels)]


def test_timm_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def offline(name, pretrained=False, **arguments):
        if pretrained:
            raise ConnectionError("no network")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"backbone\.weights=pretrained.*tf_efficientnet_lite0"):
        build_body("tf_efficientnet_lite0", weights="pretrained")
