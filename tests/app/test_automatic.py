"""Options that are ``auto``."""

from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from runs import refused
from small_run import SMALL

from cpm_rcnn.cli.choices import Facts, choose
from cpm_rcnn.cli.nodes import AUTO, PROVISIONAL
from cpm_rcnn.models.activation_memory import StepMemory

GIB = 2**30
CELLS = Facts(
    images=200,
    short_side=480,
    aspect=4 / 3,
    object_side=1 / 6,
    objects=25,
    devices=1,
    gpu=False,
    accumulated=1,
    memory=None,
    optimizer="adamw",
    freezable=1,
)
RUN = [*SMALL, "sheet_images=0", "schedule.warmup_steps=0", "schedule.max_steps=1", "schedule.milestones=[]"]
SIZES = [f"schedule.{name}=auto" for name in ("short_sides", "max_size", "test_short_side", "test_max_size")]
ALL = [*SIZES, "schedule.base_lr=auto", "schedule.images_per_device=auto", "detector.proposals_train=auto"]


def chosen(facts: Facts, **given):
    """The choices by the last part of their keys; ``given`` are values that are not auto."""
    values = {key: given.get(key.partition(".")[2], AUTO) for key in PROVISIONAL}
    return {choice.key.partition(".")[2]: choice.value for choice in choose(facts, values)}


def test_the_choices_for_two_hundred_images_on_a_cpu():
    assert chosen(CELLS) == {
        "short_sides": [256],
        "max_size": 352,
        "test_short_side": 256,
        "test_max_size": 352,
        "images_per_device": 4,
        "base_lr": 0.0012,
        "proposals_train": 800,
        "proposals_test": 400,
        "frozen_stages": 1,
    }


def test_given_values_are_kept_and_others_follow_them():
    found = chosen(CELLS, short_sides=[480, 600], images_per_device=16)
    assert "short_sides" not in found
    assert "images_per_device" not in found
    assert (found["max_size"], found["test_short_side"]) == (800, 600)
    assert found["base_lr"] == 0.0006


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({"object_side": 1 / 6}, 256),
        ({"object_side": 1 / 100}, 480),  # as large as a CPU computes in a reasonable time
        ({"object_side": 0.9}, 224),
        ({"gpu": True}, 480),  # the images' own size
        ({"gpu": True, "object_side": 1 / 15}, 608),
        ({"gpu": True, "short_side": 3000}, 800),
        ({"gpu": True, "short_side": 100}, 320),
    ],
)
def test_the_image_size_makes_small_objects_large_enough(changes, side):
    assert chosen(replace(CELLS, **changes))["short_sides"] == [side]


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({"gpu": True}, 16),
        ({"gpu": True, "devices": 8}, 2),
        ({"gpu": True, "devices": 8, "accumulated": 4}, 1),
        ({"gpu": True, "images": 6}, 6),
        ({"devices": 2}, 2),
        ({"gpu": True, "memory": (GIB, StepMemory(0, 0, 1000))}, 2),
        ({"gpu": True, "memory": (GIB, StepMemory(2 * GIB, 0, 1000))}, 1),
        ({"gpu": True, "memory": (100 * GIB, StepMemory(0, 0, 1000))}, 16),
    ],
)
def test_the_images_of_a_device_are_a_share_of_a_step_that_fits_into_its_memory(changes, images):
    assert chosen(replace(CELLS, **changes))["images_per_device"] == images


def test_adamw_s_rate_grows_with_the_root_of_the_images_per_step():
    four, sixteen = (chosen(CELLS, images_per_device=n)["base_lr"] * n / 16 for n in (4, 16))
    assert (four, sixteen) == pytest.approx((0.0003, 0.0006))
    assert chosen(replace(CELLS, optimizer="sgd"))["base_lr"] == 0.02


@pytest.mark.parametrize(
    ("images", "freezable", "frozen"),
    [(200, 0, 0), (200, 1, 1), (200, 2, 2), (5000, 2, 1), (5000, 1, 1), (50_000, 2, 0)],
)
def test_more_images_train_more_of_the_backbone(images, freezable, frozen):
    assert chosen(replace(CELLS, images=images, freezable=freezable))["frozen_stages"] == frozen


@pytest.mark.parametrize(("objects", "proposals"), [(1, (500, 300)), (25, (800, 400)), (1000, (2000, 1000))])
def test_images_with_more_objects_get_more_proposals(objects, proposals):
    found = chosen(replace(CELLS, objects=objects))
    assert (found["proposals_train"], found["proposals_test"]) == proposals


def test_a_run_prints_its_choices_keeps_them_and_resumes_with_them(command):
    answer = command("train", *RUN, *ALL, "name=automatic")
    assert answer.status == 0, answer.err
    config = OmegaConf.load(answer.folder / "config.yaml")
    assert f"schedule.short_sides={config.schedule.short_sides} " in answer.out
    side = config.data.short_sides[0]
    assert side in range(224, 481, 32)
    assert config.data.test_short_side == side
    assert side <= config.data.test_max_size == config.schedule.max_size <= 2 * side
    assert config.schedule.images_per_device == 4
    assert config.detector.proposals_train == 500
    assert "proposals_test" not in answer.out
    longer = command("train", *RUN, *ALL, "name=automatic", "schedule.max_steps=2", "resume=auto", "overwrite=false")
    assert longer.status == 0, longer.err


@pytest.mark.parametrize("argument", ["schedule.gamma=auto", "schedule.base_lr=automatic", "detector.nms_iou=auto"])
def test_other_words_and_options_are_refused(command, argument):
    assert argument in refused(command("train", *RUN, argument))


def test_every_option_that_may_be_auto_has_a_rule():
    assert {choice.key for choice in choose(CELLS, dict.fromkeys(PROVISIONAL, AUTO))} == set(PROVISIONAL)


def test_the_check_does_not_hide_a_wrong_option(command):
    assert "trainer.devices=99" in refused(command("check", *RUN, *ALL, "trainer=default", "trainer.devices=99"))


def test_the_check_of_data_without_objects_needs_no_choice(command, workplace):
    root = workplace / "empty"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / "annotations" / f"instances_{split}.json").write_text(
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "disc"}]}'
        )
    answer = command("check", "experiment=finetune", f"data.root={root}", "backbone.weights=null")
    assert answer.status == 1
    assert "2 faults" in answer.out
    assert "chosen for" not in answer.out
