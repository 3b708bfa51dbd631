import builtins

import pytest

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.backbones import CAFFE, RGB, BackboneSettings, InputFormat

TIMM = "tf_efficientnet_lite0"
VALUES = {"order": "bgr", "scale": 2.0, "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}


def format_of(name, input_format=None, **settings):
    return BackboneSettings(name, input_format=input_format, **settings).resolved_format


@pytest.mark.parametrize("name", ["tiny", "resnet18", "resnet50", "resnext50_32x4d"])
def test_default_is_rgb_with_the_statistics_of_imagenet(name):
    assert format_of(name) == format_of(name, "rgb") == RGB
    assert (RGB.order, RGB.scale, RGB.mean) == ("rgb", 255, (0.485, 0.456, 0.406))


def test_default_of_a_timm_model_is_the_format_of_its_pretrained_weights():
    assert format_of(TIMM) == format_of(TIMM, "timm") == InputFormat("rgb", 255, (0.5,) * 3, (0.5,) * 3)
    assert format_of(f"{TIMM}.in1k") == format_of(TIMM)
    assert format_of(TIMM, "rgb") == RGB


def test_timm_format_of_another_backbone_is_rgb():
    assert format_of("resnet50", "timm") == RGB


def test_explicit_values_are_used_as_they_are():
    found = format_of("tiny", VALUES)
    assert found.to_dict() == VALUES | {"stride_in_1x1": False}
    assert found == format_of("tiny", InputFormat(**VALUES))
    assert format_of(TIMM, VALUES) == found


@pytest.mark.parametrize(
    ("name", "settings", "kept"),
    [
        ("resnet50", {}, True),
        ("resnet101", {}, True),
        ("resnet", {"layout": {"blocks": [1, 1, 1, 1]}}, True),
        ("resnet18", {}, False),
        ("resnext50_32x4d", {}, False),
        ("resnet", {"layout": {"blocks": [1, 1, 1, 1], "groups": 2}}, False),
        ("tiny", {}, False),
        (TIMM, {}, False),
    ],
)
@pytest.mark.parametrize("value", ["caffe", VALUES | {"stride_in_1x1": True}], ids=["named", "explicit"])
def test_stride_in_1x1_applies_only_to_resnets_with_plain_bottlenecks(name, settings, kept, value):
    found = format_of(name, value, **settings)
    assert found.stride_in_1x1 is kept
    expected = CAFFE if value == "caffe" else InputFormat(**VALUES)
    assert (found.order, found.scale, found.mean, found.std) == (
        expected.order,
        expected.scale,
        expected.mean,
        expected.std,
    )


def test_stored_values_need_no_timm(monkeypatch):
    stored = BackboneSettings(TIMM).to_dict()
    original = builtins.__import__

    def without_timm(name, *arguments):
        if name.split(".")[0] == "timm":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    assert BackboneSettings(**stored).to_dict() == stored
    with pytest.raises(ArgumentError, match=r"^name: timm is not installed; pip install"):
        BackboneSettings(TIMM)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gbr", "input_format=gbr: must be one of rgb, caffe, timm"),
        (3, "input_format=3: must be a mapping"),
        ({"order": "rgb"}, "input_format: missing key scale, mean, std"),
        (VALUES | {"range": 255}, "input_format: unknown key range"),
        (VALUES | {"order": "gbr"}, r"input_format\.order=gbr: must be one of rgb, bgr"),
        (VALUES | {"scale": 0.0}, r"input_format\.scale=0\.0: "),
        (VALUES | {"mean": (0.0, 0.0)}, r"input_format\.mean=\[0\.0, 0\.0\]: must be a list of 3"),
        (VALUES | {"mean": ("a", "b", "c")}, r"input_format\.mean=a: must be a finite number"),
        (VALUES | {"mean": (0.0, 0.0, float("inf"))}, r"input_format\.mean=inf: must be a finite number"),
        (VALUES | {"std": (1.0,) * 4}, r"input_format\.std="),
        (VALUES | {"std": (1.0, 1.0, -1.0)}, r"input_format\.std=-1\.0: must be above 0"),
        (VALUES | {"stride_in_1x1": 1}, r"input_format\.stride_in_1x1=1: must be true or false"),
    ],
)
def test_invalid_format_is_a_user_error_that_names_the_argument(value, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        format_of("tiny", value)


def test_name_that_is_no_model_is_refused_with_the_known_names():
    with pytest.raises(ArgumentError, match=r"^name=resnet51: .*resnet50"):
        format_of("resnet51")
