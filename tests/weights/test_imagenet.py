"""ImageNet weights of ResNets and timm models: files of several programs, and the check of the input format."""

import pickle

import numpy as np
import pytest
import torch

from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.models.backbones import BackboneSettings, build_body
from cpm_rcnn.weights.backbone import load_backbone
from cpm_rcnn.weights.imagenet import resnet_weights
from imagenet_files import CAFFE, MSRA, RGB, features_of, layout, trained_on, write


def load(file, input_format, groups=1, check_weights=True):
    """A ResNet with the weights of ``file`` and an input format: a name or its values."""
    settings = BackboneSettings("resnet", layout=layout(groups), input_format=input_format, check_weights=check_weights)
    body = build_body(settings)
    load_backbone(body, settings, str(file))
    return body


@pytest.mark.parametrize("how", ["ordinary", "merged", "caffe2", "detectron2"])
def test_files_of_every_program_give_the_network_s_features(how, tmp_path):
    caffe = how == "caffe2"
    net = trained_on(MSRA if caffe else RGB)
    body = load(write(net, how, tmp_path), "caffe" if caffe else "rgb")
    if caffe:
        # torchvision's network with the stride where Caffe has it, and the stem's bias that only Caffe2 files have.
        for stage in (net.layer2, net.layer3, net.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        net.bn1.running_mean.data -= 0.25
    x = torch.randn(1, 3, 64, 64) * (60 if caffe else 1)
    with torch.inference_mode():
        for ours, theirs in zip(body(x), features_of(net, x)):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("trained", "how", "input_format"),
    [
        (CAFFE, "ordinary", "caffe"),
        (CAFFE, "merged", "caffe"),
        (CAFFE, "ordinary", MSRA),  # the two means differ by a fraction of a gray level
        (MSRA, "caffe2", "caffe"),
        (RGB, "ordinary", "rgb"),
        (RGB, "merged", "rgb"),
        (RGB, "detectron2", "rgb"),
        (RGB, "ordinary", None),
    ],
)
def test_the_format_of_the_weights_is_accepted(trained, how, input_format, tmp_path):
    load(write(trained_on(trained), how, tmp_path), input_format)


@pytest.mark.parametrize(
    ("trained", "how", "input_format", "message"),
    [
        (CAFFE, "ordinary", "rgb", "backbone.input_format gives 1;"),
        (CAFFE, "merged", "rgb", "backbone.input_format gives 1;"),
        (MSRA, "caffe2", "rgb", "backbone.input_format gives 1;"),
        (RGB, "ordinary", "caffe", "backbone.input_format gives 58;"),
        (RGB, "merged", "caffe", "backbone.input_format gives 58;"),
        (RGB, "detectron2", "caffe", "backbone.input_format gives 58;"),
    ],
)
def test_a_format_of_another_pixel_range_is_refused(trained, how, input_format, message, tmp_path):
    file = write(trained_on(trained), how, tmp_path)
    with pytest.raises(ArgumentError, match=rf"^backbone\.weights=.*{file.name}: trained on") as caught:
        load(file, input_format)
    assert message in str(caught.value)
    assert "weights for 0..255 need backbone.input_format=caffe" in str(caught.value)
    load(file, input_format, check_weights=False)


def test_caffe2_names_are_refused_with_rgb_images(tmp_path):
    file = write(trained_on(MSRA), "caffe2", tmp_path)
    rgb = CAFFE | {"order": "rgb", "mean": CAFFE["mean"][::-1]}
    with pytest.raises(ArgumentError, match=rf"^backbone\.weights=.*{file.name}: .*BGR.*backbone\.input_format=caffe"):
        load(file, rgb)
    load(file, rgb, check_weights=False)


@pytest.mark.parametrize("input_format", ["caffe", "rgb"])
def test_a_resnext_has_its_stride_on_the_3x3_convolution_in_every_format(input_format, tmp_path):
    file = write(trained_on({"caffe": CAFFE, "rgb": RGB}[input_format], groups=8), "ordinary", tmp_path)
    body = load(file, input_format, groups=8)
    strides = [(stage[0].conv1.stride, stage[0].conv2.stride) for stage in body.layers]
    assert strides == [((1, 1), (1, 1))] + [((1, 1), (2, 2))] * 3


def test_timm_weights_of_another_pixel_range_or_format_are_refused(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    net.bn1.running_var.fill_(58.0**2)
    net.conv_stem.weight.data.div_(net.conv_stem.weight.data.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    file = tmp_path / "lite0.pth"
    torch.save(net.state_dict(), file)

    def load_timm(**options):
        settings = BackboneSettings("tf_efficientnet_lite0", **options)
        load_backbone(build_body(settings), settings, str(file))

    with pytest.raises(ArgumentError, match=r"lite0\.pth: trained on pixels with a standard deviation of about 58"):
        load_timm()
    with pytest.raises(ArgumentError, match=r"lite0\.pth: .*set backbone\.input_format=timm"):
        load_timm(input_format="caffe")
    load_timm(input_format="caffe", check_weights=False)


def test_a_pickle_of_another_program_is_refused_by_name(tmp_path):
    file = tmp_path / "odd.pkl"
    file.write_bytes(pickle.dumps({"model": {"layer": np.zeros(3, np.float32)}}))
    with pytest.raises(UserError, match=r"odd\.pkl: does not fit .*missing: conv1.weight.*unexpected: layer"):
        load(file, "rgb")


def test_a_network_that_torchvision_does_not_have_needs_a_file():
    with pytest.raises(ArgumentError, match=r"IMAGENET1K_V1: no such file; allowed: null, a local file"):
        resnet_weights("resnext101_32x4d", "IMAGENET1K_V1")
