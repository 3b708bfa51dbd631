"""What a training run says: its log file, and each validation once."""

import pytest
import torch
from runs import metrics, refused, same
from small_run import SMALL

from cpm_rcnn.commands import train as train_module
from cpm_rcnn.evaluation.coco_metric import CocoMetric
from cpm_rcnn.evaluation.module import EvaluationModule
from cpm_rcnn.weights.checkpoints import detector_state

RUN = [*SMALL, "schedule.max_steps=2", "schedule.val_interval=2", "sheet_images=0"]


def test_the_log_file_has_the_course_of_the_run(command):
    answer = command("train", *RUN, "name=logged")
    log = (answer.folder / "train.log").read_text()
    for part in ("training from step 0 to 2:", "1 process on cpu", "step 2: train/loss ", "val/AP ", "ended at step 2"):
        assert part in log


SCORES = [([0.1, 0.2], 2), ([0.2, 0.1], 3)]


@pytest.mark.parametrize("select", ["best", "last"])
@pytest.mark.parametrize(("scores", "validations"), SCORES)
def test_best_and_last_are_reported_and_the_best_is_validated_again_only_if_it_is_older(
    command, monkeypatch, scores, validations, select
):
    compute, steps = CocoMetric.compute, []

    def scored(self):
        return {**compute(self), "AP": [*scores, max(scores)][len(steps) - 1]}

    start = EvaluationModule._start

    def started(self, split):
        steps.append(self.trainer.global_step)
        start(self, split)

    monkeypatch.setattr(CocoMetric, "compute", scored)
    monkeypatch.setattr(EvaluationModule, "_start", started)
    drawn = []
    monkeypatch.setattr(train_module, "validation_sheet", lambda detector, *rest: drawn.append(detector.model))
    answer = command(
        *("train", *RUN, f"name=scored_{scores[0]}", "schedule.val_interval=1", f"select={select}", "sheet_images=1")
    )
    assert answer.status == 0, answer.err
    assert len(steps) == validations
    found = metrics(answer.folder)
    best = 1 + scores.index(max(scores))
    assert (found["selected"], found["AP"]) == (select, {"best": max(scores), "last": scores[-1]}[select])
    assert (found["best"]["step"], found["best"]["AP"]) == (best, max(scores))
    assert (found["last"]["step"], found["last"]["AP"]) == (2, scores[-1])
    assert found["last"]["per_class"].keys() == found["per_class"].keys()
    line = f"AP: last (step 2) {100 * scores[-1]:.1f}, best (step {best}) {100 * max(scores):.1f}"
    assert f"{line}; the table is of the {select} checkpoint" in answer.out
    checkpoint = torch.load(answer.folder / f"checkpoints/{select}.ckpt", weights_only=True)
    assert same(detector_state(checkpoint), drawn[0].state_dict())


def test_a_checkpoint_that_does_not_exist_cannot_be_selected(command):
    assert "select=newest: must be one of best, last" in refused(command("train", *RUN, "select=newest"))


def test_new_recipe_weights_are_named_when_a_training_with_sgd_starts_from_them(command, monkeypatch):
    named = []
    monkeypatch.setattr(train_module, "warn_of_new_recipe", lambda settings: named.append(settings.name))
    for optimizer, expected in (("adamw", []), ("sgd", ["tiny"])):
        options = [f"name=recipe_{optimizer}", f"schedule.optimizer={optimizer}", "schedule.base_lr=0.001"]
        answer = command("train", *RUN, *options)
        assert answer.status == 0, answer.err
        assert named == expected


@pytest.mark.parametrize("options", [["trainer=ddp"], ["trainer.accelerator=auto", "trainer.devices=8"]])
@pytest.mark.parametrize(("gpus", "has"), [(0, "no GPU"), (2, "2 GPUs")])
def test_more_devices_than_gpus_are_refused_before_any_process_starts(command, monkeypatch, options, gpus, has):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    line = refused(command("train", *RUN, *options))
    assert f"trainer.devices=8: this machine has {has}; trainer=cpu" in line
