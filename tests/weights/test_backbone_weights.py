import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.backbones.build import build_body

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


def test_stem_and_c2_are_frozen_with_weights_and_nothing_without(resnet18, tmp_path):
    torch.save(resnet18.state_dict(), tmp_path / "r18.pth")
    with_weights, without = build_body("resnet18", str(tmp_path / "r18.pth")), build_body("resnet18")
    assert all(p.requires_grad for p in without.parameters())
    frozen = {
        name.split(".")[0] + name.split(".")[1] for name, p in with_weights.named_parameters() if not p.requires_grad
    }
    assert frozen == {"stemconv1", "layers0"}


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
