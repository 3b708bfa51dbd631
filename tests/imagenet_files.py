"""ResNet weights with known statistics, written as the files of several programs."""

import pickle
import re

import numpy as np
import torch
from torch import nn
from torchvision.models import resnet

from release_files import recipe

RGB = {"order": "rgb", "scale": 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CAFFE = {
    "order": "bgr",
    "scale": 1,
    "mean": (102.9801, 115.9465, 122.7717),
    "std": (1, 1, 1),
    "stride_in_1x1": True,
}
# detectron2's mean for the same networks.
MSRA = CAFFE | {"mean": (103.53, 116.28, 123.675)}
LAYOUT = {"blocks": [1, 1, 1, 1]}


def layout(groups=1):
    """The layout of :func:`trained_on`'s network."""
    return LAYOUT | ({"groups": groups, "width_per_group": 4} if groups > 1 else {})


def trained_on(input_format, groups=1):
    """A ResNet with four blocks whose first BatchNorm has the statistics of images in that format."""
    torch.manual_seed(0)
    options = {"groups": groups, "width_per_group": 4} if groups > 1 else {}
    net = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], **options).eval()
    images = torch.stack([torch.from_numpy(recipe.image(96, 128, seed).copy()).permute(2, 0, 1) for seed in range(4)])
    images = images.float() if input_format["order"] == "bgr" else images.float().flip(1)
    mean, std = (torch.tensor(input_format[key], dtype=torch.float32).view(3, 1, 1) for key in ("mean", "std"))
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.2, 0.6)
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    with torch.no_grad():
        response = net.conv1((images / input_format["scale"] - mean) / std)
        net.bn1.running_mean.copy_(response.mean((0, 2, 3)))
        net.bn1.running_var.copy_(response.var((0, 2, 3)))
    return net


def merge(net):
    """The state dict of ``net`` with each BatchNorm merged into a scale and a shift, as Caffe stores it."""
    state = {name: value for name, value in net.state_dict().items() if "running" not in name and "num_b" not in name}
    for name, norm in net.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
            state[f"{name}.weight"], state[f"{name}.bias"] = scale, norm.bias.detach() - norm.running_mean * scale
    return state


def caffe2_names(state):
    """The same tensors by Caffe2's names: stage 1 is res2, and branch1 is the shortcut."""
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
    """The same tensors by detectron2's names, without the classifier."""
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
    """Write the weights of ``net``: ``ordinary``, ``merged``, ``caffe2`` or ``detectron2``."""
    file = folder / f"{how}.pkl"
    if how == "caffe2":
        # As Python 2 wrote it, with state of Caffe2's solver.
        file.write_bytes(pickle.dumps({"blobs": caffe2_names(merge(net))}, protocol=2))
    elif how == "detectron2":
        state = {name: value for name, value in net.state_dict().items() if "num_b" not in name}
        file.write_bytes(pickle.dumps({"model": detectron2_names(state), "__author__": "x"}))
    else:
        file = folder / f"{how}.pth"
        torch.save(merge(net) if how == "merged" else net.state_dict(), file)
    return file


def features_of(net, x):
    """C2..C5 of torchvision's ResNet."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return [x := stage(x) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
