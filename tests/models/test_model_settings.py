import json
from collections.abc import Sequence
from typing import get_args, get_origin

import pytest

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models import settings as settings_module
from cpm_rcnn.models.backbones import BackboneSettings, InputFormat
from cpm_rcnn.models.backbones.resnet import ResNetLayout
from cpm_rcnn.models.heads import HEADS
from cpm_rcnn.models.heads.box_head import BoxHeadSettings
from cpm_rcnn.models.heads.box_stage import BoxStageSettings
from cpm_rcnn.models.heads.cascade import CascadeSettings
from cpm_rcnn.models.heads.cpm import CPMSettings
from cpm_rcnn.models.heads.faster import FasterSettings
from cpm_rcnn.models.heads.grid_stage import StageSettings
from cpm_rcnn.models.rpn import RPNSettings
from cpm_rcnn.models.settings import ModelSettings, TrunkSettings
from cpm_rcnn.settings import Settings

TIMM = "tf_efficientnet_lite0"
BACKBONES = {
    "tiny": "tiny",
    "resnet": "resnet50",
    "resnext": {"name": "resnext101_64x4d", "deformable_stages": [3, 4, 5]},
    "caffe": {"name": "resnet50", "input_format": "caffe", "weights": "r50.pth", "frozen_stages": 3},
    "layout": {"name": "resnet", "layout": {"blocks": [1, 1, 1, 1], "groups": 2}},
    "timm": {"name": TIMM, "weights": "pretrained", "check_weights": False},
    "explicit format": {
        "name": "tiny",
        "input_format": {"order": "bgr", "scale": 2.0, "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]},
    },
    "settings": BackboneSettings("resnet18"),
}
# Valid required values of every settings dataclass of the model.
REQUIRED = {
    TrunkSettings: {},
    RPNSettings: {},
    CPMSettings: {},
    BoxHeadSettings: {},
    FasterSettings: {},
    CascadeSettings: {},
    BoxStageSettings: {},
    StageSettings: {"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0},
    BackboneSettings: {"name": "resnet", "layout": {"blocks": [1, 1, 1, 1]}},
    InputFormat: {"order": "rgb", "scale": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3},
    ResNetLayout: {"blocks": [1, 1, 1, 1]},
}


def subclasses(kind):
    return {inner for child in kind.__subclasses__() for inner in {child} | subclasses(child)}


def test_tests_below_cover_every_settings_dataclass_of_the_model():
    of_the_model = {kind for kind in subclasses(Settings) if kind.__module__.startswith("cpm_rcnn.models.")}
    assert set(REQUIRED) == of_the_model


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_options_survive_a_round_trip_through_json(backbone):
    settings = ModelSettings.from_options(
        backbone,
        convention="inclusive",
        anchor_sizes=[16, 32, 64, 128, 256],
        stages=[{"positive_iou": 0.4, "mapping_ratio": 0.8, "loss_weight": 2.0}],
        test_stages=1,
    )
    options = json.loads(json.dumps(settings.to_options()))
    again = ModelSettings.from_options(**options)
    assert again == settings
    assert again.to_options() == options == settings.to_options()
    assert again.architecture() == settings.architecture()


def test_default_options_survive_a_round_trip_through_json():
    settings = ModelSettings.from_options("tiny")
    assert ModelSettings.from_options(**json.loads(json.dumps(settings.to_options()))) == settings


@pytest.mark.parametrize("head", HEADS)
def test_every_option_belongs_to_exactly_one_dataclass(head):
    names = [*TrunkSettings.names(), *RPNSettings.names(), *HEADS[head].settings_class.names()]
    # Arguments of build_detector itself.
    names += ["backbone", "num_classes"]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("head", HEADS)
def test_options_reach_the_dataclass_that_they_belong_to(head):
    settings = ModelSettings.from_options("tiny", head=head, fpn_channels=8, proposals_test=7)
    assert (settings.trunk.head, settings.trunk.fpn_channels, settings.rpn.proposals_test) == (head, 8, 7)
    assert isinstance(settings.head, HEADS[head].settings_class)


@pytest.mark.parametrize("head", HEADS)
def test_unknown_option_is_refused_with_all_allowed_options(head):
    with pytest.raises(ArgumentError) as caught:
        ModelSettings.from_options("tiny", head=head, fpn_channel=16, nms=0.5)
    message = str(caught.value)
    assert message.startswith(f"fpn_channel: the head {head} has no such option; it has ")
    allowed = message.split("it has ")[1].split(", ")
    parts = (TrunkSettings, RPNSettings, HEADS[head].settings_class)
    assert allowed == [name for part in parts for name in part.names()]


def all_settings(value):
    """``value`` and every settings dataclass inside it."""
    if isinstance(value, Settings):
        yield value
        for name in value.names():
            yield from all_settings(getattr(value, name))
    elif isinstance(value, tuple):
        for inner in value:
            yield from all_settings(inner)


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_architecture_contains_no_training_or_testing_option(backbone):
    settings = ModelSettings.from_options(backbone)
    fields = [name.split(".")[-1] for name in settings.architecture()]
    parts = [part for whole in vars(settings).values() for part in all_settings(whole)]
    for part in parts:
        assert not set(fields) & set(part.names("training") + part.names("inference"))
        nested = {name for name in part.names() if list(all_settings(getattr(part, name)))}
        assert set(part.names("architecture")) - nested <= set(fields)
    json.dumps(settings.architecture())


def test_architecture_names_nested_options_by_their_path():
    found = ModelSettings.from_options("tiny").architecture()
    assert found["stages.1.mapping_ratio"] == 0.5
    assert found["backbone.input_format.order"] == "rgb"
    assert found["convention"] == "continuous"


def test_models_that_differ_in_training_and_testing_have_the_same_architecture():
    stages = [stage | {"loss_weight": 3.0} for stage in ModelSettings.from_options("tiny").to_options()["stages"]]
    other = ModelSettings.from_options("tiny", nms_iou=0.5, samples=8, proposals_train=9, stages=stages)
    assert other.architecture() == ModelSettings.from_options("tiny").architecture()
    assert ModelSettings.from_options("tiny", fpn_channels=8).architecture() != other.architecture()


def test_options_for_testing_are_those_of_the_rpn_and_of_all_heads():
    # Not imported by name, or pytest would collect it.
    names = settings_module.inference_options()
    assert {"proposals_test", "score_threshold", "nms_iou", "test_stages"} <= set(names)
    assert len(names) == len(set(names))
    assert not {"samples", "stages", "proposals_train", "loss_weight"} & set(names)


def wrong_values(annotation):
    """Values that no field of this type accepts; numbers in settings are never negative."""
    if get_origin(annotation) is Sequence:
        items = [object(), None, *wrong_values(get_args(annotation)[0])]
        return [object(), None, 5, "12345", {}, *([item] * 4 for item in items)]
    kinds = get_args(annotation) or (annotation,)
    wrong = [object(), [1]] if type(None) in kinds else [object(), [1], None]
    for kind in kinds:
        if kind is int:
            wrong += [-1, 2.5, True, "2", float("nan")]
        elif kind is float:
            wrong += [-0.1, True, "0.5", float("nan")]
        elif kind is bool:
            wrong += [0, 1, "true"]
        elif kind is str:
            wrong += [3, True, "", {}]
    return wrong


EVERY_FIELD = [(kind, name) for kind in REQUIRED for name in kind.names()]


@pytest.mark.parametrize(("kind", "name"), EVERY_FIELD, ids=[f"{kind.__name__}.{name}" for kind, name in EVERY_FIELD])
def test_values_of_the_wrong_type_are_refused_with_the_name_of_the_field(kind, name):
    annotation = kind.__dataclass_fields__[name].type
    for value in wrong_values(annotation):
        with pytest.raises(ArgumentError) as caught:
            kind(**REQUIRED[kind] | {name: value})
        assert caught.value.argument.split("[")[0] == name, value


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (StageSettings, "positive_iou", 1.01),
        (CPMSettings, "score_threshold", 1.01),
        (CPMSettings, "nms_iou", 1.01),
        (CPMSettings, "point_channels", 6),
        (CPMSettings, "stages", []),
        (CPMSettings, "test_stages", 0),
        (CPMSettings, "test_stages", 4),
        (RPNSettings, "anchor_sizes", [8, 16, 32, 64]),
        (RPNSettings, "anchor_sizes", [0.5, 16, 32, 64, 128]),
        (TrunkSettings, "head", "none"),
        (TrunkSettings, "convention", "CONTINUOUS"),
        (BackboneSettings, "frozen_stages", 6),
        (BackboneSettings, "deformable_stages", [2]),
        (InputFormat, "order", "RGB"),
        (InputFormat, "scale", 0.5),
        (InputFormat, "mean", [0.0] * 4),
        (InputFormat, "std", [1.0, 0.0, 1.0]),
        (ResNetLayout, "blocks", [1, 1, 1]),
        (ResNetLayout, "blocks", [1, 0, 1, 1]),
    ],
)
def test_values_out_of_range_are_refused_with_the_name_of_the_field(kind, name, value):
    with pytest.raises(ArgumentError, match=f"^{name}="):
        kind(**REQUIRED[kind] | {name: value})


def test_integer_fields_with_a_minimum_of_1_refuse_0():
    checked = 0
    for kind in REQUIRED:
        for name in kind.names():
            if kind.__dataclass_fields__[name].type in (int, int | None) and name != "frozen_stages":
                with pytest.raises(ArgumentError, match=f"^{name}=0: "):
                    kind(**REQUIRED[kind] | {name: 0})
                checked += 1
    assert checked > 8
