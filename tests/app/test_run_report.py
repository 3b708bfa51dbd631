"""What a training run says: its log file, and each validation once."""

import pytest
import torch
from runs import metrics, refused
from small_run import SMALL

from cpm_rcnn.evaluation.coco_metric import CocoMetric
from cpm_rcnn.evaluation.module import EvaluationModule

RUN = [*SMALL, "schedule.max_steps=2", "schedule.val_interval=2", "sheet_images=0"]


def test_the_log_file_has_the_course_of_the_run(command):
    answer = command("train", *RUN, "name=logged")
    log = (answer.folder / "train.log").read_text()
    for part in ("training from step 0 to 2:", "1 process on cpu", "step 2: train/loss ", "val/AP ", "ended at step 2"):
        assert part in log


@pytest.mark.parametrize(("scores", "validations"), [([0.1, 0.2], 2), ([0.2, 0.1], 3)])
def test_the_best_checkpoint_is_validated_again_only_if_it_is_older_than_the_last(
    command, monkeypatch, scores, validations
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
    answer = command("train", *RUN, f"name=scored_{scores[0]}", "schedule.val_interval=1")
    assert answer.status == 0, answer.err
    assert len(steps) == validations
    assert metrics(answer.folder)["AP"] == max(scores)


@pytest.mark.parametrize("options", [["trainer=ddp"], ["trainer.accelerator=auto", "trainer.devices=8"]])
@pytest.mark.parametrize(("gpus", "has"), [(0, "no GPU"), (2, "2 GPUs")])
def test_more_devices_than_gpus_are_refused_before_any_process_starts(command, monkeypatch, options, gpus, has):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    line = refused(command("train", *RUN, *options))
    assert f"trainer.devices=8: this machine has {has}; trainer=cpu" in line
