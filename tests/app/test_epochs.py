"""Trainings whose length is given in epochs."""

import pytest
from omegaconf import OmegaConf
from runs import last_checkpoint, metrics, refused, rows_of
from small_run import SMALL

from cpm_rcnn.cli import lightning
from cpm_rcnn.cli.epochs import Lengths, auto_epochs, lengths

RUN = [*SMALL, "sheet_images=0", "schedule.warmup_steps=0"]


def test_the_lengths_keep_the_form_of_the_schedule():
    found = lengths(12, 1000, 16, max_steps=180000, milestones=[120000, 160000], warmup_steps=500)
    assert found == Lengths(750, [500, 667], 75, 63)
    assert lengths(100, 8, 4, 1500, [1100, 1400], 150) == Lengths(200, [147, 187], 20, 10)
    assert lengths(0.1, 8, 4, 1500, [1100, 1400], 150) == Lengths(1, [1, 1], 0, 1)


@pytest.mark.parametrize(("images", "epochs"), [(10, 100), (60, 100), (200, 30), (500, 12), (100_000, 12)])
def test_small_data_sets_get_more_epochs(images, epochs):
    assert auto_epochs(images) == epochs


@pytest.mark.parametrize(
    ("devices", "nodes", "gpus", "expected"),
    [
        (2, 1, 0, 2), ("2", 3, 0, 6), ("auto", 1, 0, 1), ("auto", 1, 4, 4), (-1, 2, 4, 8), ([0, 3], 1, 4, 2),
        ("0,3", 1, 4, 2),
    ],
)  # fmt: skip
def test_each_device_has_a_process(monkeypatch, devices, nodes, gpus, expected):
    monkeypatch.setattr(lightning.torch.cuda, "device_count", lambda: gpus)
    accelerator = "gpu" if gpus else "cpu"
    config = OmegaConf.create({"trainer": {"accelerator": accelerator, "devices": devices, "num_nodes": nodes}})
    assert lightning.process_count(config) == expected


def test_a_run_has_its_epochs_and_can_be_extended_by_more(command):
    answer = command("train", *RUN, "schedule.epochs=2", "name=epochs")
    assert answer.status == 0, answer.err
    steps = last_checkpoint(answer.folder)["global_step"]
    images, per_step = 6, 2
    assert steps == 2 * images / per_step
    assert f"2 epochs of 6 images are {steps} steps of 2" in answer.out
    assert [int(row["step"]) + 1 for row in rows_of(answer.folder) if row["val/AP"]] == [3, 6]
    answer = command("train", *RUN, "schedule.epochs=3", "name=epochs", "resume=auto")
    assert answer.status == 0, answer.err
    assert metrics(answer.folder)["last"]["step"] == 9


@pytest.mark.parametrize("value", ["0", "-1", "abc", "true"])
def test_numbers_of_epochs_that_make_no_sense_are_refused(command, value):
    assert f"schedule.epochs={value}" in refused(command("train", *RUN, f"schedule.epochs={value}"))
