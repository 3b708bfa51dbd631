"""ImageNet starting points: names of every origin, and refusal of images that the weights do not know."""

import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.backbones.build import build_body
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.backbones.resnet import ResNet
from release_files import recipe

CAFFE = {"order": "bgr", "scale": 1, "mean": (102.9801, 115.9465, 122.7717), "std": (1, 1, 1)}
MSRA = CAFFE | {"mean": (103.53, 116.28, 123.675)}
TORCH = {"order": "rgb", "scale": 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LAYOUT = {"blocks": [1, 1, 1, 1]}


def trained_on(pixel_format, groups=1):
    """A one-block ResNet whose first norm has the statistics of images in that format; other norms are random."""
    torch.manual_seed(0)
    options = {"groups": groups, "width_per_group": 4} if groups > 1 else {}
    net = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], **options).eval()
    images = torch.stack([torch.from_numpy(recipe.image(96, 128, seed).copy()).permute(2, 0, 1) for seed in range(4)])
    images = images.float() if pixel_format["order"] == "bgr" else images.float().flip(1)
    mean, std = (torch.tensor(pixel_format[key], dtype=torch.float32).view(3, 1, 1) for key in ("mean", "std"))
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.2, 0.6)
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    with torch.no_grad():
        response = net.conv1((images / pixel_format["scale"] - mean) / std)
        net.bn1.running_mean.copy_(response.mean((0, 2, 3)))
        net.bn1.running_var.copy_(response.var((0, 2, 3)))
    return net


def build(weights, pixel_format, *, stride_in_1x1=False, groups=1, check_weights=True):
    layout = LAYOUT | ({"groups": groups, "width_per_group": 4} if groups > 1 else {})
    backbone = {
        "name": "resnet",
        "layout": layout,
        "weights": str(weights),
        "stride_in_1x1": stride_in_1x1,
        "pixel_format": pixel_format,
        "check_weights": check_weights,
    }
    sizes = {"fpn_channels": 8, "mlp_channels": 8, "point_channels": 4, "grid_convs": 1}
    return build_detector(backbone, 3, **sizes).backbone.body


def merge(net):
    """Scale and shift of every norm, as Caffe stores them, under torchvision's names; convolutions as they are."""
    state = {name: value for name, value in net.state_dict().items() if "running" not in name and "num_b" not in name}
    for name, norm in net.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
            state[f"{name}.weight"], state[f"{name}.bias"] = scale, norm.bias.detach() - norm.running_mean * scale
    return state


def caffe2_names(state):
    """Caffe2's names, spelt out here once more: stage 1 is res2, and branch1 is the shortcut."""
    branches = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "downsample.0": "branch1"}
    norms = {"bn1": "branch2a", "bn2": "branch2b", "bn3": "branch2c", "downsample.1": "branch1"}
    blobs = {"conv1_b": np.full(64, 0.25, np.float32), "lr": np.float32(0.1), "conv1_w_momentum": np.zeros(3)}
    for name, value in state.items():
        if match := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)\.(weight|bias)", name):
            stage, block, layer, kind = match.groups()
            suffix = {"weight": "bn_s", "bias": "bn_b"}[kind] if layer in norms else "w"
            blob = f"res{int(stage) + 1}_{block}_{(norms | branches)[layer]}_{suffix}"
        else:
            known = {"conv1.weight": "conv1_w", "bn1.weight": "res_conv1_bn_s", "bn1.bias": "res_conv1_bn_b"}
            blob = known.get(name) or {"fc.weight": "fc1000_w", "fc.bias": "fc1000_b"}[name]
        blobs[blob] = value.numpy()
    return blobs


def detectron2_names(state):
    renamed = {}
    for name, value in state.items():
        new = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
        new = re.sub(r"^(conv1|bn1)", r"stem.\1", new)
        new = re.sub(r"bn(\d)\.", r"conv\1.norm.", new)
        new = new.replace("downsample.1.", "shortcut.norm.").replace("downsample.0.", "shortcut.")
        if not name.startswith("fc."):
            renamed[new] = value.numpy()
    return renamed


def write(net, how, folder):
    file = folder / f"{how}.pkl"
    if how == "caffe2":
        # As Python 2 wrote it, with a solver's leftovers.
        file.write_bytes(pickle.dumps({"blobs": caffe2_names(merge(net))}, protocol=2))
    elif how == "detectron2":
        state = {name: value for name, value in net.state_dict().items() if "num_b" not in name}
        file.write_bytes(pickle.dumps({"model": detectron2_names(state), "__author__": "x"}))
    else:
        file = folder / f"{how}.pth"
        torch.save(merge(net) if how == "merged" else net.state_dict(), file)
    return file


def features_of(net, x):
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return [x := stage(x) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]


@pytest.mark.parametrize("how", ["ordinary", "merged", "caffe2", "detectron2"])
def test_files_of_every_origin_give_the_net_s_features(how, tmp_path):
    net = trained_on(MSRA if how == "caffe2" else TORCH)
    caffe = how == "caffe2"
    file = write(net, how, tmp_path)
    body = build(file, MSRA if caffe else TORCH, stride_in_1x1=caffe)
    assert isinstance(body, ResNet)
    if caffe:
        # torchvision's net with the stride where Caffe has it, and the stem's bias that only Caffe2 files have.
        for stage in (net.layer2, net.layer3, net.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        net.bn1.running_mean.data -= 0.25
    x = torch.randn(1, 3, 64, 64) * (60 if caffe else 1)
    with torch.inference_mode():
        for ours, theirs in zip(body(x), features_of(net, x)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


FITS = [
    (CAFFE, "ordinary", CAFFE, True),
    (CAFFE, "merged", CAFFE, True),
    (CAFFE, "ordinary", MSRA, True),  # Caffe's two means are a fraction of a grey level apart
    (MSRA, "caffe2", CAFFE, True),
    (TORCH, "ordinary", TORCH, False),
    (TORCH, "merged", TORCH, False),
    (TORCH, "detectron2", TORCH, False),
]


@pytest.mark.parametrize(("made", "how", "fed", "stride"), FITS)
def test_the_file_s_own_format_is_accepted(made, how, fed, stride, tmp_path):
    build(write(trained_on(made), how, tmp_path), fed, stride_in_1x1=stride)


RGB_255 = CAFFE | {"order": "rgb", "mean": CAFFE["mean"][::-1]}
BGR_1 = TORCH | {"order": "bgr", "mean": TORCH["mean"][::-1], "std": TORCH["std"][::-1]}
MISFITS = [
    (CAFFE, "ordinary", TORCH, False, "pixel_format makes them vary by 1"),
    (CAFFE, "merged", TORCH, False, "pixel_format makes them vary by 1"),
    (MSRA, "caffe2", TORCH, False, "pixel_format makes them vary by 1"),
    (TORCH, "ordinary", CAFFE, True, "pixel_format makes them vary by 58"),
    (TORCH, "merged", CAFFE, True, "pixel_format makes them vary by 58"),
    (CAFFE, "ordinary", CAFFE, False, "set backbone.stride_in_1x1=true"),
    (TORCH, "ordinary", TORCH, True, "set backbone.stride_in_1x1=false"),
    (CAFFE, "ordinary", RGB_255, True, "set backbone.pixel_format.order=bgr"),
    (TORCH, "ordinary", BGR_1, False, "set backbone.pixel_format.order=rgb"),
    (TORCH, "detectron2", BGR_1, False, "set backbone.pixel_format.order=rgb"),
    (CAFFE, "ordinary", CAFFE | {"mean": CAFFE["mean"][::-1]}, True, "set backbone.pixel_format.mean="),
    (TORCH, "ordinary", TORCH | {"mean": (0.5, 0.5, 0.5)}, False, "set backbone.pixel_format.mean="),
    (TORCH, "ordinary", TORCH | {"std": (1, 1, 1)}, False, "set backbone.pixel_format.std="),
    (CAFFE, "ordinary", CAFFE | {"std": (2, 2, 2)}, True, "set backbone.pixel_format.std="),
]


@pytest.mark.parametrize(("made", "how", "fed", "stride", "says"), MISFITS)
def test_another_format_is_refused_with_what_to_set(made, how, fed, stride, says, tmp_path):
    file = write(trained_on(made), how, tmp_path)
    with pytest.raises(UserError, match=rf"backbone\.weights=.*{file.name}: ") as caught:
        build(file, fed, stride_in_1x1=stride)
    assert says in str(caught.value)
    build(file, fed, stride_in_1x1=stride, check_weights=False)  # for those who know better


def test_a_grouped_net_has_its_stride_on_the_3x3_in_either_format(tmp_path):
    for made in (CAFFE, TORCH):
        file = write(trained_on(made, groups=8), "ordinary", tmp_path)
        build(file, made, groups=8)
        with pytest.raises(UserError, match="stride_in_1x1=false"):
            build(file, made, groups=8, stride_in_1x1=True)


def test_timm_weights_for_another_range_are_refused(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    net.bn1.running_var.fill_(58.0**2)
    net.conv_stem.weight.data.div_(net.conv_stem.weight.data.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    file = tmp_path / "lite0.pth"
    torch.save(net.state_dict(), file)
    sizes = {"fpn_channels": 8, "mlp_channels": 8, "point_channels": 4, "grid_convs": 1}
    backbone = {"name": "tf_efficientnet_lite0", "weights": str(file)}
    with pytest.raises(UserError, match=r"lite0\.pth: trained on pixels that vary by about 58"):
        build_detector(backbone, 3, **sizes)
    with pytest.raises(UserError, match="belongs to order rgb by timm"):
        build_detector(backbone | {"pixel_format": CAFFE}, 3, **sizes)
    build_detector(backbone | {"pixel_format": CAFFE, "check_weights": False}, 3, **sizes)


def test_a_timm_file_that_is_not_all_there_is_refused(tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet10t", pretrained=False).state_dict()
    file = tmp_path / "r10t.pth"
    torch.save({name: value for name, value in state.items() if not name.startswith("layer2.")}, file)
    with pytest.raises(UserError, match=r"r10t\.pth: does not fit the model; \d+ missing: layer2\."):
        build_body("resnet10t", str(file))
    torch.save(state, file)
    body = build_body("resnet10t", str(file))
    assert torch.equal(body.net.layer2[0].conv1.weight, state["layer2.0.conv1.weight"])


def test_a_pickle_that_is_none_of_these_is_named(tmp_path):
    file = tmp_path / "odd.pkl"
    file.write_bytes(pickle.dumps({"model": {"layer": np.zeros(3, np.float32)}}))
    with pytest.raises(UserError, match=r"odd\.pkl: does not fit .*missing: conv1.weight.*unexpected: layer"):
        build(file, TORCH)
