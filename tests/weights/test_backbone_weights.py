"""Pretrained weights of a backbone: names known to torchvision and timm, local files, and damaged ones."""

import hashlib
import sys
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet18_Weights, get_model, get_model_weights, list_models

from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.models.backbones import BackboneSettings, build_body
from cpm_rcnn.models.backbones.resnet import RESNETS
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.weights import imagenet
from cpm_rcnn.weights.backbone import load_backbone
from cpm_rcnn.weights.initialize import initialize
from imagenet_files import features_of

TIMM = "tf_efficientnet_lite0"


def load(name, weights, **options):
    """A backbone with ``weights``; random test weights have no known pixel range, so it is not checked."""
    settings = BackboneSettings(name, weights=str(weights), **{"check_weights": False, **options})
    body = build_body(settings)
    load_backbone(body, settings, settings.weights)
    return body


@pytest.fixture(scope="module")
def resnet18():
    """torchvision's network, with statistics and affine parameters unlike the initial ones."""
    torch.manual_seed(0)
    net = get_model("resnet18", weights=None)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("file", ["r18.pth", "r18.safetensors", "wrapped.pth"])
def test_a_local_file_of_torchvision_weights_gives_torchvision_s_features(resnet18, tmp_path, file):
    path = tmp_path / file
    if path.suffix == ".safetensors":
        save_file(resnet18.state_dict(), path)
    else:
        torch.save({"model": resnet18.state_dict()} if file == "wrapped.pth" else resnet18.state_dict(), path)
    body, images = load("resnet18", path), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(body(images), features_of(resnet18, images)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_weight_name_of_torchvision_is_downloaded(resnet18, monkeypatch):
    asked = []

    def get_state_dict(self, *arguments, **options):
        asked.append((self, options["check_hash"]))
        return resnet18.state_dict()

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    body = load("resnet18", "IMAGENET1K_V1")
    assert asked == [(ResNet18_Weights.IMAGENET1K_V1, True)]
    assert torch.equal(body.stem.conv1.weight, resnet18.conv1.weight)


def test_initialize_loads_the_weights_that_the_settings_name(resnet18, tmp_path):
    torch.save(resnet18.state_dict(), tmp_path / "r18.pth")
    backbone = {"name": "resnet18", "weights": str(tmp_path / "r18.pth"), "check_weights": False}
    detector = build_detector(backbone, 3, fpn_channels=8, mlp_channels=8, point_channels=4, grid_convs=1)
    assert not torch.equal(detector.backbone.body.stem.conv1.weight, resnet18.conv1.weight)
    initialize(detector)
    assert torch.equal(detector.backbone.body.stem.conv1.weight, resnet18.conv1.weight)


def test_loading_keeps_the_initial_offsets_of_deformable_layers(tmp_path):
    torch.save(get_model("resnet50", weights=None).state_dict(), tmp_path / "r50.pth")
    body = load("resnet50", tmp_path / "r50.pth", deformable_stages=(5,))
    assert (body.layers[3][0].conv2.conv_offset.weight == 0).all()


def test_a_local_file_of_timm_weights_gives_timm_s_weights(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(TIMM, pretrained=False).eval()
    torch.save(net.state_dict(), tmp_path / "lite0.pth")
    body = load(TIMM, tmp_path / "lite0.pth")
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in body.net.state_dict().items())


def damage(state, how):
    if how == "missing":
        del state["layer1.0.conv1.weight"]
    elif how == "of another shape":
        state["layer1.0.conv1.weight"] = torch.zeros(1)
    else:
        state["layer9.weight"] = torch.zeros(1)
    return state


@pytest.mark.parametrize("how", ["missing", "of another shape", "unexpected"])
def test_a_file_that_does_not_fit_is_refused_with_the_differences(resnet18, tmp_path, how):
    file = tmp_path / "damaged.pth"
    torch.save(damage(dict(resnet18.state_dict()), how), file)
    with pytest.raises(UserError, match=rf"backbone\.weights=.*damaged\.pth: does not fit the model: 1 {how}: layer"):
        load("resnet18", file)


def test_files_of_another_network_and_files_without_weights_are_refused_by_name(resnet18, tmp_path):
    torch.save(resnet18.state_dict(), tmp_path / "r18.pth")
    with pytest.raises(UserError, match=r"r18\.pth"):
        load("resnet50", tmp_path / "r18.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(UserError, match=rf"backbone\.weights=.*{name}: cannot be read"):
            load("resnet18", tmp_path / name)


def test_a_file_that_contains_no_mapping_is_refused_by_name(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"backbone\.weights=.*list\.pth: contains a list"):
        load("resnet18", tmp_path / "list.pth")


def test_unknown_weights_are_refused_with_the_allowed_ones():
    with pytest.raises(ArgumentError, match=r"^backbone\.weights=IMAGENET9: .*IMAGENET1K_V1"):
        load("resnet18", "IMAGENET9")
    with pytest.raises(ArgumentError, match=r"^backbone\.weights=IMAGENET1K_V1: no such file.*pretrained"):
        load(TIMM, "IMAGENET1K_V1")


def test_an_incomplete_timm_file_is_refused(tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet10t", pretrained=False).state_dict()
    file = tmp_path / "r10t.pth"
    torch.save({name: value for name, value in state.items() if not name.startswith("layer2.")}, file)
    with pytest.raises(UserError, match=r"r10t\.pth: does not fit the model: \d+ missing: layer2\."):
        load("resnet10t", file)
    torch.save(state, file)
    body = load("resnet10t", file)
    assert torch.equal(body.net.layer2[0].conv1.weight, state["layer2.0.conv1.weight"])


def test_a_timm_model_whose_layers_timm_renames_loads_a_local_file(tmp_path):
    timm = pytest.importorskip("timm")
    file = tmp_path / "convnext.safetensors"
    whole = timm.create_model("convnext_atto", pretrained=False)
    save_file(whole.state_dict(), file)
    body = load("convnext_atto", file)
    torch.testing.assert_close(body.net.stem_0.weight, whole.stem[0].weight)
    assert not body.net.stem_0.weight.requires_grad
    with pytest.raises(UserError, match=r"convnext\.safetensors"):
        load("convnext_femto", file)


def test_a_failed_download_of_timm_weights_gives_one_line(monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def offline(name, pretrained=False, **arguments):
        if pretrained:
            raise ConnectionError("no network")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ArgumentError, match=rf"^backbone\.weights=pretrained.*{TIMM}") as caught:
        load(TIMM, "pretrained")
    assert "\n" not in str(caught.value)


def test_a_failed_download_of_torchvision_weights_gives_one_line(monkeypatch):
    def get_state_dict(self, *arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    with pytest.raises(ArgumentError, match=r"^backbone\.weights=IMAGENET1K_V1: cannot download https.*no network"):
        load("resnet18", "IMAGENET1K_V1")


@pytest.fixture
def served(resnet18, tmp_path, monkeypatch):
    """Weights of ``resnet18`` on a server of this machine, known by timm's name ``resnet18.gluon_in1k``.

    Returns a function that changes the address under which they are known.
    """
    torch.save(resnet18.state_dict(), tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8]
    for name in (f"resnet18-{digest}.pth", "resnet18-01234567.pth"):
        (tmp_path / name).write_bytes((tmp_path / "weights").read_bytes())

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def known_as(file=f"resnet18-{digest}.pth", port=server.server_port):
        url = f"http://127.0.0.1:{port}/{file}"
        monkeypatch.setattr(imagenet, "TIMM_FILES", {"resnet18.gluon_in1k": url})
        return url

    known_as()
    yield known_as
    server.shutdown()
    server.server_close()


def test_weights_with_timm_s_name_are_downloaded_once_without_timm(served, resnet18, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for _ in range(2):
        body = load("resnet18", "resnet18.gluon_in1k")
        assert torch.equal(body.stem.conv1.weight, resnet18.conv1.weight)
        served(port=1)  # the second time, the file is not asked for


def test_a_download_that_fails_or_does_not_match_its_hash_gives_one_line_with_the_address(served):
    for options, why in (({"port": 1}, "refused"), ({"file": "none-01234567.pth"}, "404")):
        url = served(**options)
        with pytest.raises(
            ArgumentError, match=rf"^backbone\.weights=resnet18\.gluon_in1k: cannot download {url} .*{why}"
        ):
            load("resnet18", "resnet18.gluon_in1k")
    url = served("resnet18-01234567.pth")
    with pytest.raises(ArgumentError, match=rf"cannot download {url} .*hash.*; download it elsewhere") as caught:
        load("resnet18", "resnet18.gluon_in1k")
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_not_offered(served):
    with pytest.raises(ArgumentError, match=r"^backbone\.weights=resnet18\.gluon_in1k: no such file") as caught:
        load("resnet50", "resnet18.gluon_in1k")
    assert "gluon" not in str(caught.value).partition("no such file")[2]


@pytest.mark.parametrize("name", imagenet.TIMM_FILES)
def test_files_with_timm_s_names_are_those_of_timm_and_of_the_rgb_format(name):
    timm = pytest.importorskip("timm")
    config = timm.get_pretrained_cfg(name)
    assert config.url == imagenet.TIMM_FILES[name]
    settings = BackboneSettings(name.partition(".")[0])
    assert (config.mean, config.std) == (settings.resolved_format.mean, settings.resolved_format.std)
    with torch.device("meta"):
        theirs, ours = timm.create_model(settings.name), get_model(settings.name)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}


NEW = {("resnext101_64x4d", "IMAGENET1K_V1"), *((name, "IMAGENET1K_V2") for name in RESNETS)}
NAMED = [
    (name, weights)
    for name in RESNETS
    if name in list_models()
    for weights in get_model_weights(name).__members__
    if weights != "DEFAULT"
]


@pytest.mark.parametrize(("name", "weights"), [*NAMED, ("resnext101_64x4d", "resnext101_64x4d.gluon_in1k")])
def test_weights_of_torchvision_s_newer_recipe_are_named_in_one_line_with_older_ones(name, weights, caplog):
    imagenet.warn_of_new_recipe(BackboneSettings(name, weights=weights))
    assert len(caplog.messages) == ((name, weights) in NEW)
    if caplog.messages:
        assert caplog.messages[0].startswith(f"backbone.weights={weights}: ")
        older = "resnext101_64x4d.gluon_in1k" if name == "resnext101_64x4d" else "IMAGENET1K_V1"
        assert f"backbone.weights={older} is" in caplog.messages[0]


@pytest.mark.parametrize(
    "options", [{"name": "tiny"}, {"name": "resnet50"}, {"name": "resnet50", "weights": "r50.pth"}]
)
def test_other_weights_are_not_said_to_be_of_a_newer_recipe(options, caplog):
    imagenet.warn_of_new_recipe(BackboneSettings(**options))
    assert not caplog.messages
