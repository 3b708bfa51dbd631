"""Every head works with all commands: training, exact resume, evaluation, multi-scale test, prediction, multirun."""

import os
import signal

import pytest
from runs import last_checkpoint, metrics, refused, same_run
from small_run import SMALL

from cpm_rcnn.inference import load
from cpm_rcnn.models.heads import HEADS
from cpm_rcnn.training.module import DetectionModule

RUN = [*SMALL, "schedule.val_interval=4", "sheet_images=0"]


@pytest.mark.parametrize("head", ["faster", "cascade"])
def test_a_head_trains_resumes_evaluates_and_predicts(command, monkeypatch, head):
    run = [*RUN, f"head={head}", "ism=on", "rsm=on"]
    whole = command("train", *run, f"name={head}")
    assert whole.status == 0, whole.err
    checkpoint = whole.folder / "checkpoints/last.ckpt"
    assert isinstance(load(checkpoint).model.head, HEADS[head])

    step_of = DetectionModule.training_step

    def stopped(self, batch, batch_idx):
        if batch_idx == 1:
            monkeypatch.setattr(DetectionModule, "training_step", step_of)
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(self, batch, batch_idx)

    monkeypatch.setattr(DetectionModule, "training_step", stopped)
    name = f"name={head}_stopped"
    assert command("train", *run, name).status == 128 + signal.SIGTERM
    resumed = command("train", *run, name, "overwrite=false", "resume=auto")
    assert resumed.status == 0, resumed.err
    assert same_run(last_checkpoint(resumed.folder), last_checkpoint(whole.folder))

    evaluated = command("eval", f"ckpt={checkpoint}", "trainer=cpu")
    assert evaluated.status == 0, evaluated.err
    assert metrics(evaluated.folder)["AP"] == metrics(whole.folder)["AP"]
    scales = "multi_scale.scales=[1.0,1.25]"
    assert command("eval", f"ckpt={checkpoint}", "trainer=cpu", "multi_scale=on", scales).status == 0
    predicted = command(
        "predict",
        f"ckpt={checkpoint}",
        "source=data/shapes/val",
        "device=cpu",
        "detector.ism=false",
        "detector.score_threshold=0.0",
        "detector.max_detections=3",
    )
    assert predicted.status == 0, predicted.err
    assert (predicted.folder / "detections.json").stat().st_size > 100


def test_a_multirun_names_its_folders_after_the_head(command):
    answer = command("train", "-m", *RUN, "schedule.max_steps=1", "head=faster", "rsm=on")
    assert answer.status == 0, answer.err
    assert [path.name for path in answer.folder.glob("0_*")] == ["0_faster_cmm-none_ism-off_rsm-on"]


def test_a_group_that_the_head_does_not_have_is_refused(command):
    line = refused(command("train", *RUN, "head=cascade", "cmm=off"))
    assert line == "error: cmm: the chosen head has no such group"
    assert refused(command("train", *RUN, "head=cascade", "+cmm=off")) == "error: cmm: head=cascade has no such group"


def test_a_checkpoint_of_another_head_is_not_resumed(command):
    assert command("train", *RUN, "head=faster", "schedule.max_steps=1", "name=first").status == 0
    line = refused(command("train", *RUN, "head=cascade", "name=first", "overwrite=false", "resume=auto"))
    assert "head is faster in the checkpoint and cascade in this model" in line


def test_training_with_each_box_convention_gives_finite_weights(command):
    for convention in ("inclusive", "detectron2", "torchvision"):
        answer = command("train", *RUN, "head=cascade", "schedule.max_steps=1", f"detector.convention={convention}")
        assert answer.status == 0, answer.err
        weights = last_checkpoint(answer.folder)["state_dict"].values()
        assert len(weights) > 50
        assert all(value.isfinite().all() for value in weights)
