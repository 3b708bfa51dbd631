"""cpm_rcnn.load: from a checkpoint to a detector, with other test-time settings."""

import pytest
import torch

import cpm_rcnn
from cpm_rcnn.errors import ArgumentError, UserError, shown
from cpm_rcnn.inference import MultiScaleSettings
from cpm_rcnn.inference.load import overrides_of_load
from small_models import CATEGORIES, SIZES, change_checkpoint, same_values, small_module, write_trained

IMAGE = torch.randint(0, 256, (3, 70, 110), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    return path, write_trained(path)


@pytest.fixture
def checkpoint(trained):
    return trained[0]


def same_detections(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "scores", "labels"))


def test_the_loaded_detector_gives_the_same_detections_as_the_model_in_the_run(trained):
    path, module = trained
    detector = cpm_rcnn.load(path)
    assert not detector.model.training
    assert detector.device.type == "cpu"
    assert same_values(detector.model.state_dict(), module.model.state_dict())
    assert detector.categories == CATEGORIES
    (expected,) = module.detector.detect([IMAGE])
    (found,) = detector.detect([IMAGE])
    assert len(found) > 0
    assert same_detections(found, expected)


OVERRIDES = {
    "score_threshold": 0.4,
    "nms_iou": 0.6,
    "final_nms_iou": 0.5,
    "test_stages": 1,
    "max_detections": 3,
    "proposals_test": 7,
    "test_short_side": 50,
    "test_max_size": 200,
    "tile": 80,
    "tile_overlap": 0.5,
    "ism": False,
    "rsm": False,
}


def values_of(detector):
    """The values that a detector uses, by the names of the overrides."""
    head, rpn = detector.model.head, detector.model.rpn
    names = ("score_threshold", "nms_iou", "final_nms_iou", "test_stages", "max_detections")
    return {name: getattr(head.settings, name) for name in names} | {
        "proposals_test": rpn.settings.proposals_test,
        "test_short_side": detector.short_side,
        "test_max_size": detector.max_size,
        "tile": detector.tile,
        "tile_overlap": detector.tile_overlap,
        "ism": head.ism is not None,
        "rsm": head.rsm is not None,
    }


def test_every_test_time_setting_can_be_overridden(checkpoint):
    # The head of the checkpoint averages no scores.
    assert set(overrides_of_load()) == {*OVERRIDES, "score_average"}
    stored = values_of(cpm_rcnn.load(checkpoint))
    for name, value in OVERRIDES.items():
        assert values_of(cpm_rcnn.load(checkpoint, **{name: value})) == stored | {name: value}
    assert values_of(cpm_rcnn.load(checkpoint, **OVERRIDES)) == OVERRIDES


def test_multi_scale_can_be_set(checkpoint):
    settings = MultiScaleSettings(scales=[0.5, 0.75], flip=False)
    assert cpm_rcnn.load(checkpoint, multi_scale=settings).multi_scale is settings


@pytest.mark.parametrize("name", ["score", "mlp_channels", "fusion", "samples", "head", "backbone", "stages"])
def test_other_settings_are_refused_with_the_allowed_ones(checkpoint, name):
    with pytest.raises(ArgumentError, match=rf"^{name}=1: not a test-time setting; allowed: ") as caught:
        cpm_rcnn.load(checkpoint, **{name: 1})
    assert all(allowed in str(caught.value) for allowed in OVERRIDES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score_threshold", 2),
        ("nms_iou", "high"),
        ("final_nms_iou", 1.5),
        ("proposals_test", 0),
        ("test_stages", 4),
        ("test_short_side", 0),
        ("test_max_size", None),
        ("tile", 10),
        ("tile_overlap", 1),
        ("rsm", "off"),
    ],
)
def test_invalid_values_are_refused_with_the_bare_name_of_the_override(checkpoint, name, value):
    with pytest.raises(ArgumentError, match=rf"^{name}={shown(value)}: "):
        cpm_rcnn.load(checkpoint, **{name: value})


def test_ism_and_rsm_change_the_scores_but_not_the_boxes(checkpoint):
    whole, without = (cpm_rcnn.load(checkpoint, **parts) for parts in ({}, {"ism": False, "rsm": False}))
    (scored,), (unscored,) = whole.detect([IMAGE]), without.detect([IMAGE])
    order, other = scored.boxes.sum(1).argsort(), unscored.boxes.sum(1).argsort()
    torch.testing.assert_close(scored.boxes[order], unscored.boxes[other])
    assert not torch.allclose(scored.scores, unscored.scores)


def test_fewer_stages_give_other_boxes(checkpoint):
    (three,), (one,) = (cpm_rcnn.load(checkpoint, test_stages=k).detect([IMAGE]) for k in (3, 1))
    assert len(three) == len(one)
    assert not torch.allclose(three.boxes, one.boxes)


def test_a_part_that_the_checkpoint_lacks_cannot_be_added(tmp_path):
    write_trained(tmp_path / "plain.ckpt", small_module(rsm=False))
    assert cpm_rcnn.load(tmp_path / "plain.ckpt", rsm=False).model.head.rsm is None
    with pytest.raises(UserError, match=r"^path=.*plain\.ckpt: does not fit the model: \d+ missing: head\.rsm"):
        cpm_rcnn.load(tmp_path / "plain.ckpt", rsm=True)


def test_the_original_size_is_kept_if_the_data_of_the_run_kept_it(checkpoint, tmp_path):
    path = change_checkpoint(checkpoint, tmp_path / "original.ckpt", data=SIZES | {"test_short_side": None})
    detector = cpm_rcnn.load(path)
    assert detector.short_side is None
    assert detector.resize(IMAGE) is IMAGE
    assert cpm_rcnn.load(path, test_short_side=35).resize(IMAGE).shape == (3, 35, 55)
    assert cpm_rcnn.load(checkpoint, test_short_side=None).resize(IMAGE) is IMAGE


def test_sizes_that_the_checkpoint_does_not_have_are_the_default(checkpoint, tmp_path):
    detector = cpm_rcnn.load(change_checkpoint(checkpoint, tmp_path / "bare.ckpt", data={}))
    assert (detector.short_side, detector.max_size) == (800, 1333)


def test_weights_that_are_not_finite_are_named(tmp_path):
    module = write_trained(tmp_path / "good.ckpt")
    name = "head.stages.1.convs.0.weight"
    module.model.state_dict()[name][0, 0, 0, 0] = float("nan")
    module.model.state_dict()["head.rsm.predictor.bias"][0] = float("inf")
    checkpoint = torch.load(tmp_path / "good.ckpt", weights_only=True)
    checkpoint["state_dict"] = module.state_dict()
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=rf"^path=.*bad\.ckpt: 2 of \d+ tensors .* the first is {name}; .*diverged"):
        cpm_rcnn.load(tmp_path / "bad.ckpt")
