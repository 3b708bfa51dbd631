"""Invalid values give one line with the config key, the value as it was written, and what is allowed."""

import json

import pytest
import torch
from runs import refused
from small_run import SMALL

from cpm_rcnn import load

RUN = [*SMALL, "schedule.max_steps=1", "sheet_images=0", "name=invalid"]


def check(line: str, start: str, *parts: str) -> None:
    assert line.startswith(f"error: {start}"), line
    assert "None" not in line
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("argument", "allowed"),
    [
        ("trainer.precision=abc", "32-true, bf16-mixed, 16-mixed"),
        ("trainer.precision=64-true", "32-true, bf16-mixed, 16-mixed"),
        ("trainer.accelerator=xyz", "auto, cpu, gpu, cuda, mps"),
        ("trainer.accelerator=null", "auto, cpu, gpu, cuda, mps"),
        ("trainer.devices=abc", "a number of devices"),
        ("trainer.devices=0", "a number of devices"),
        ("trainer.devices=null", "a number of devices"),
        ("trainer.devices=-1", "a number of processes on the CPU"),
        ("trainer.devices=[0, 1]", "a number of processes on the CPU"),
        ("trainer.strategy=abc", "auto, ddp"),
        ("trainer.strategy=null", "a string"),
        ("trainer.num_nodes=0", "an integer, at least 1"),
        ("trainer.gradient_clip_val=-1", "a number, at least 0"),
        ("trainer.log_every_n_steps=abc", "an integer, at least 0"),
        ("trainer.limit_val_batches=abc", "a number of batches, a fraction"),
        ("trainer.limit_val_batches=0.01", "limit_val_batches=0.5"),
        ("trainer.fast_dev_run=abc", "true, false, or a number of batches"),
        ("trainer.benchmark=abc", "true or false"),
        ("trainer.deterministic=abc", "true, false, warn"),
        ("+trainer.gradient_clip_algorithm=abc", "norm"),
        ("+trainer.max_epochs=3", "the command sets it"),
        ("+data.batch_size=3", "the command sets it"),
        ("+logger.csv.save_dir=x", "the command sets it"),
        ("+logger.csv.foo=x", ""),
    ],
)
def test_errors_about_the_arguments_of_lightning_name_the_option(command, argument, allowed):
    key = argument.lstrip("+") if "csv.foo" not in argument else "logger.csv: "
    check(refused(command("train", *RUN, argument)), key, allowed)


@pytest.mark.parametrize("argument", ["trainer.precision=abc", "trainer.limit_val_batches=0", "trainer.devices=abc"])
def test_eval_checks_the_options_of_its_trainer(command, checkpoint, argument):
    check(refused(command("eval", f"ckpt={checkpoint}", "trainer=cpu", argument)), f"{argument}: must be")


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("eval", [], "ckpt: must be given, for example ckpt=outputs/NAME/checkpoints/best.ckpt"),
        ("predict", ["ckpt=x"], "source: must be given, for example source=FILE_OR_FOLDER"),
        ("predict", [], "ckpt, source: must be given"),
        ("convert", ["dst=x"], "src: must be given, for example src=RELEASED.pth"),
        ("convert", ["src=x"], "dst: must be given, for example dst=NEW.ckpt"),
    ],
)
def test_all_keys_that_must_be_given_are_named_with_an_example(command, name, arguments, line):
    check(refused(command(name, *arguments)), line)


@pytest.mark.parametrize(
    "argument",
    [
        *("seed=null", "detector.nms_iou=null", "data.short_sides=null", "cmm.stages=null", "name=null"),
        *("overwrite=null", "data.on_error=null", "backbone.name=null", "detector.convention=null", "logger.csv=null"),
    ],
)
def test_null_is_printed_as_the_user_wrote_it(command, argument):
    check(refused(command("train", *RUN, argument)), f"{argument}: must be")


@pytest.mark.parametrize(
    ("name", "argument", "parts"),
    [
        ("train", "detector=null", ["detector.NAME=VALUE"]),
        ("train", "ops=null", ["ops.NAME=VALUE"]),
        ("train", "detector=3", ["detector.NAME=VALUE"]),
        ("train", "backbone=null", ["must be one of", "r50"]),
        ("train", "backbone=3", ["must be one of", "r50"]),
        ("train", "data=null", ["must be one of", "coco"]),
        ("train", "schedule=null", ["must be one of", "2x"]),
        ("train", "trainer=null", ["must be one of", "cpu"]),
        ("train", "head=null", ["must be one of", "cpm"]),
        ("train", "head=fastr", ["there is no conf/head/fastr.yaml; must be one of cascade, cpm, faster"]),
        ("train", "experiment=3", ["must be one of", "quickstart"]),
        ("train", "multi_scale=on", ["train has no group multi_scale"]),
        ("eval", "detector=null", ["detector.NAME=VALUE"]),
        ("eval", "ops=null", ["ops.NAME=VALUE"]),
        ("eval", "data=null", ["eval has no group data", "trainer, multi_scale"]),
        ("eval", "data=coco", ["eval has no group data", "trainer, multi_scale"]),
        ("eval", "trainer=null", ["must be one of", "cpu"]),
        ("eval", "overrides=null", ["eval has no group overrides"]),
        ("eval", "ckpt=null", ["must be a path"]),
        ("eval", "split=null", ["must be val, test, or a COCO-style json"]),
        ("eval", "multi_scale.enabled=3", ["must be true or false"]),
        ("predict", "detector=null", ["detector.NAME=VALUE"]),
        ("predict", "ops=null", ["ops.NAME=VALUE"]),
        ("predict", "device=null", ["must be auto, cpu"]),
        ("predict", "device=meta", ["must be auto, cpu"]),
        ("predict", "multi_scale.enabled=3", ["must be true or false"]),
        ("predict", "source=null", ["must be a path"]),
        ("convert", "detector=null", ["detector.NAME=VALUE"]),
        ("convert", "schedule=null", ["must be one of", "2x"]),
        ("convert", "src=null", ["must be a path"]),
    ],
)
def test_null_and_plain_values_in_place_of_groups_nodes_and_paths_are_refused(
    command, checkpoint, name, argument, parts
):
    ready = {
        "train": RUN,
        "eval": [f"ckpt={checkpoint}", "trainer=cpu"],
        "predict": [f"ckpt={checkpoint}", "source=data/shapes/val/000001.jpg"],
        "convert": ["src=x", "dst=y"],
    }[name]
    check(refused(command(name, *ready, argument)), f"{argument}: ", *parts)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["~seed"], "~seed: an option can be changed, not removed"),
        (["seed=99999999999999999999"], "seed=99999999999999999999: must be an integer, 0 to 4294967295"),
        (["schedule.base_lr=inf"], "schedule.base_lr=inf: must be a number"),
        (["data.short_sides=[1.5]"], "data.short_sides=1.5: must be an integer"),
        (["schedule.milestones=[-1]"], "schedule.milestones=-1: must be an integer"),
        (["cmm.stages.x=1"], "Hydra cannot compose the config of "),
        (["cmm.stages={a:1}"], "Error merging override cmm.stages={a:1}: Cannot merge"),
        (
            ["data._target_=pytorch_lightning.Trainer"],
            "data._target_=pytorch_lightning.Trainer: must be one of cpm_rcnn",
        ),
        (["+logger.foo={}"], "logger.foo._target_=[]: there must be exactly one"),
        (["+foo.bar=3"], "foo: unknown option; the config has"),
        (["+foo.bar.baz=3"], "foo: unknown option; the config has"),
        (["data.train_count.x=3"], "data.train_count.x: unknown option; data.train_count has no options"),
        (["resume=data"], "resume=data: is a folder, not a file"),
        (["resume=2024"], "resume=2024: no such file"),
        (["seed=${nosuch}"], "seed: Interpolation key 'nosuch' not found"),
        (["seed=["], "seed=[: not an override that Hydra can read; special characters need quotes"),
        (["=3"], "=3: an argument is written KEY=VALUE"),
    ],
)
def test_other_invalid_arguments_of_train_are_named(command, checkpoint, arguments, line):
    check(refused(command("train", *RUN, *arguments)), line)


def test_images_without_a_json_of_the_user_are_refused(command, checkpoint):
    check(refused(command("eval", f"ckpt={checkpoint}", "trainer=cpu", "images=x")), "images=x: belongs to split=JSON")


def test_a_source_that_is_not_an_image_is_named(command, checkpoint, workplace):
    (workplace / "note.txt").write_text("text")
    line = refused(command("predict", f"ckpt={checkpoint}", "source=note.txt", "device=cpu"))
    check(line, "note.txt is damaged or not an image in a supported format")


def test_errors_about_the_split_of_a_json_name_split_and_images(command, checkpoint, workplace):
    (workplace / "empty").mkdir(exist_ok=True)
    evaluation, json_file = ["eval", f"ckpt={checkpoint}", "trainer=cpu"], "data/shapes/annotations/instances_val.json"
    for arguments, start in (
        (["split=/nosuch.json", "images=empty"], "split=/nosuch.json: no such file"),
        (["split=empty", "images=empty"], "split=empty: is a folder"),
        ([f"split={json_file}"], f"split={json_file}: give its images with images="),
        ([f"split={json_file}", "images=nosuch"], "images=nosuch: no such folder"),
        ([f"split={json_file}", "images=empty"], f"images={workplace / 'empty'}: 5 of 5 images cannot be read"),
    ):
        line = refused(command(*evaluation, *arguments))
        check(line, start)
        assert "test_" not in line


def test_null_turns_off_an_option_that_a_checkpoint_stores(command, checkpoint, workplace):
    content = torch.load(checkpoint, weights_only=True)
    # An IoU of 0 leaves one box per class.
    content["hyper_parameters"]["model"]["final_nms_iou"] = 0.0
    stored = workplace / "final_nms.ckpt"
    torch.save(content, stored)

    def detections(path, *arguments):
        more = ["source=data/shapes/val", "device=cpu", "detector.score_threshold=0.0"]
        answer = command("predict", f"ckpt={path}", *more, *arguments)
        assert answer.status == 0, answer.err
        return json.loads((answer.folder / "detections.json").read_text())

    without = detections(checkpoint)
    assert detections(stored) != without
    assert detections(stored, "detector.final_nms_iou=null") == without
    assert load(stored).model.settings.head.final_nms_iou == 0
    assert load(stored, final_nms_iou=None).model.settings.head.final_nms_iou is None
    line = refused(command("eval", f"ckpt={stored}", "trainer=cpu", "detector.nms_iou=null"))
    check(line, "detector.nms_iou=null: must be a number")
    evaluated = command("eval", f"ckpt={stored}", "trainer=cpu", "data.test_short_side=null")
    assert evaluated.status == 0, evaluated.err
