"""Runs with a moving average of the weights, and runs that stop early."""

import os
import signal

import pytest
import torch
from runs import last_checkpoint, metrics, refused, same, same_run
from small_run import SMALL

from cpm_rcnn.training.averaging import MovingAverage
from cpm_rcnn.training.module import DetectionModule

RUN = [*SMALL, "schedule.max_steps=5", "schedule.val_interval=3", "schedule.warmup_steps=0", "sheet_images=0"]
AVERAGED = [*RUN, "ema=0.9"]


@pytest.fixture(scope="module")
def checkpoints():
    """The last checkpoint of an undisturbed run; filled by the first test."""
    return {}


def test_the_average_is_what_is_kept_and_training_goes_on_with_the_weights(command, checkpoints):
    averaged = last_checkpoint(command("train", *AVERAGED, "name=averaged").folder)
    plain = last_checkpoint(command("train", *RUN, "name=plain").folder)
    assert averaged["state_dict"].keys() == plain["state_dict"].keys()
    assert same(averaged["current_model_state"], plain["state_dict"])
    assert not same(averaged["state_dict"], plain["state_dict"])
    checkpoints["averaged"] = averaged


@pytest.mark.parametrize("method", ["training_step", "validation_step"])
def test_a_stopped_run_resumes_to_the_same_average(command, checkpoints, monkeypatch, method):
    original = getattr(DetectionModule, method)

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            monkeypatch.setattr(DetectionModule, method, original)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DetectionModule, method, interrupted)
    answer = command("train", *AVERAGED, f"name=stopped_{method}")
    assert answer.status == 128 + signal.SIGTERM
    answer = command("train", *AVERAGED, f"name=stopped_{method}", "resume=auto")
    assert answer.status == 0, answer.err
    found = last_checkpoint(answer.folder)
    assert same_run(found, checkpoints["averaged"])
    assert same(found["current_model_state"], checkpoints["averaged"]["current_model_state"])
    line = refused(command("train", *RUN, f"name=stopped_{method}", "resume=auto"))
    assert "ema is 0.9 there and null here" in line


def test_the_decay_grows_to_its_value():
    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

    from torch.optim.swa_utils import AveragedModel

    weights = Weights()
    averaged = AveragedModel(weights, avg_fn=MovingAverage(0.5)._kwargs["avg_fn"])
    expected = 0.0
    for step in range(30):
        with torch.no_grad():
            weights.weight.fill_(step)
        averaged.update_parameters(weights)
        kept = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * step
    assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_a_run_without_progress_stops_early(command):
    more = ["schedule.base_lr=0", "schedule.max_steps=9", "schedule.val_interval=2", "early_stopping=1"]
    answer = command("train", *RUN, *more, "name=early")
    assert answer.status == 0, answer.err
    assert metrics(answer.folder)["last"]["step"] == 4


@pytest.mark.parametrize("argument", ["ema=2", "ema=a", "early_stopping=0"])
def test_values_that_make_no_sense_are_refused(command, argument):
    assert argument in refused(command("train", *RUN, argument))
