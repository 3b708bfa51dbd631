"""A run that was stopped resumes and ends with the weights of an undisturbed run, bit for bit."""

import os
import signal

import pytest
import torch
from runs import last_checkpoint, refused, rows_of, same_run
from small_run import SMALL

from cpm_rcnn.training.module import DetectionModule

STEPS = 7
RUN = [*SMALL, f"schedule.max_steps={STEPS}", "schedule.val_interval=3", "schedule.warmup_steps=2", "sheet_images=0"]


@pytest.fixture
def send(monkeypatch):
    """Send a signal to this process during a training step, once: ``send(SIGTERM, step)``."""
    step_of = DetectionModule.training_step

    def at(number, step):
        def training_step(self, batch, batch_idx):
            if batch_idx == step:
                monkeypatch.setattr(DetectionModule, "training_step", step_of)
                os.kill(os.getpid(), number)
            return step_of(self, batch, batch_idx)

        monkeypatch.setattr(DetectionModule, "training_step", training_step)

    return at


_whole = {}


@pytest.fixture
def whole(command):
    """The last checkpoint of an undisturbed run."""
    if not _whole:
        answer = command("train", *RUN, "name=whole")
        assert answer.status == 0, answer.err
        _whole["checkpoint"] = last_checkpoint(answer.folder)
    return _whole["checkpoint"]


@pytest.mark.parametrize(
    ("number", "step", "workers"),
    [
        (signal.SIGTERM, 0, 0),
        (signal.SIGUSR1, 1, 0),
        (signal.SIGTERM, 2, 0),  # the step before a validation
        (signal.SIGUSR1, 3, 2),
        (signal.SIGTERM, 4, 2),
        (signal.SIGTERM, STEPS - 1, 0),
    ],
)
def test_a_stopped_run_saves_and_resumes_to_the_same_weights(command, whole, send, number, step, workers):
    name = f"name=stopped_{step}"
    send(number, step)
    answer = command("train", *RUN, name, f"data.num_workers={workers}")
    assert answer.status == 128 + number
    assert f"stopped by {number.name} at step {step + 1}" in answer.out
    assert last_checkpoint(answer.folder)["global_step"] == step + 1
    answer = command("train", *RUN, name, "resume=auto", f"data.num_workers={workers}")
    assert answer.status == 0, answer.err
    assert same_run(last_checkpoint(answer.folder), whole)
    assert (answer.folder / "metrics.json").is_file()
    assert (answer.folder / "loss.png").is_file()


def test_a_run_restores_the_signal_handlers(command):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert command("train", *RUN, "name=signals", "schedule.max_steps=1").status == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_run_stopped_twice_keeps_all_its_metrics(command, whole, send):
    for step in (1, 4):
        send(signal.SIGTERM, step)
        assert command("train", *RUN, "name=twice", "resume=auto").status == 128 + signal.SIGTERM
    answer = command("train", *RUN, "name=twice", "resume=auto")
    assert same_run(last_checkpoint(answer.folder), whole)
    logged = [rows_of(answer.folder, name) for name in ("metrics_001.csv", "metrics_002.csv", "metrics.csv")]
    steps = [int(row["step"]) for rows in logged for row in rows if row["train/loss"]]
    # Lightning logs a step after its end, so the two steps at which the run stopped are trained but not logged.
    assert steps == [step for step in range(STEPS) if step not in (1, 4)]


def test_a_stop_loses_no_accumulated_gradient(command, send):
    more = ["trainer.accumulate_grad_batches=2", "schedule.max_steps=3", "schedule.val_interval=3"]
    straight = command("train", *RUN, *more, "name=accumulated")
    send(signal.SIGTERM, 2)  # the first batch of the second step; the run stops after the second batch
    answer = command("train", *RUN, *more, "name=accumulated_stopped")
    assert last_checkpoint(answer.folder)["global_step"] == 2
    answer = command("train", *RUN, *more, "name=accumulated_stopped", "resume=auto")
    assert answer.status == 0, answer.err
    assert same_run(last_checkpoint(answer.folder), last_checkpoint(straight.folder))


def test_a_truncated_checkpoint_is_skipped_and_the_previous_one_used(command, whole):
    answer = command("train", *RUN, "name=killed", "schedule.max_steps=6", "checkpoint_interval=2")
    folder = answer.folder / "checkpoints"
    best = torch.load(folder / "best.ckpt", weights_only=True)["global_step"]
    last = folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-5000])
    (folder / "last.ckpt.part").write_bytes(b"half a checkpoint")
    answer = command("train", *RUN, "name=killed", "resume=auto")
    assert answer.status == 0, answer.err
    assert "last.ckpt" in answer.err + answer.out
    assert next(int(row["step"]) for row in rows_of(answer.folder) if row["train/loss"]) == best
    assert same_run(last_checkpoint(answer.folder), whole)


def test_resume_auto_starts_at_step_0_without_a_checkpoint(command, whole):
    answer = command("train", *RUN, "name=anew", "resume=auto")
    assert answer.status == 0, answer.err
    assert "no checkpoint" in answer.out + answer.err
    assert same_run(last_checkpoint(answer.folder), whole)


def test_a_run_of_another_model_is_not_resumed(command, trained):
    last = trained.folder / "checkpoints/last.ckpt"
    line = refused(command("train", *SMALL, "detector.mlp_channels=24", f"resume={last}"))
    assert "mlp_channels is 16 in the checkpoint and 24 in this model" in line


def test_checkpoints_are_written_at_their_interval(command):
    answer = command("train", *RUN, "name=interval", "checkpoint_interval=2", "schedule.val_interval=7")
    assert answer.status == 0, answer.err
    line = refused(command("train", *RUN, "checkpoint_interval=0"))
    assert "checkpoint_interval=0" in line


def test_a_run_that_is_extended_has_the_weights_of_a_longer_one(command, whole):
    short = command("train", *RUN, "name=extended", "schedule.max_steps=4")
    assert last_checkpoint(short.folder)["global_step"] == 4
    for steps in (5, STEPS):
        answer = command("train", *RUN, "name=extended", f"schedule.max_steps={steps}", "resume=auto")
        assert answer.status == 0, answer.err
    assert same_run(last_checkpoint(answer.folder), whole)


@pytest.fixture
def started(command, workplace):
    """The name of a run that ended at step 2, and its last checkpoint."""
    folder = workplace / "outputs/started"
    if not folder.exists():
        assert command("train", *RUN, "name=started", "schedule.max_steps=2").status == 0
    return folder, last_checkpoint(folder)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (["schedule.base_lr=0.01", "seed=1"], ["schedule.base_lr is ", " and 0.01 here", "seed is 0 there and 1 here"]),
        (["schedule.images_per_device=1"], ["schedule.images_per_device is 2 there and 1 here"]),
        (["schedule.weight_decay=0.2"], ["schedule.weight_decay is ", "0.2 here"]),
        (["data.flip_probability=0"], ["data.flip_probability is 0.5 there and 0 here"]),
        (["detector.samples=32"], ["samples is 16 there and 32 here"]),
        (["trainer.gradient_clip_val=1"], ["trainer.gradient_clip_val is 10.0 there and 1 here"]),
    ],
)
def test_another_recipe_is_refused_with_both_values(command, started, options, values):
    line = refused(command("train", *RUN, "name=started", "resume=auto", *options))
    assert all(value in line for value in [*values, "resume_changes=allow"]), line


@pytest.mark.parametrize("options", [["schedule.optimizer=sgd"], ["trainer.accumulate_grad_batches=2"]])
def test_what_cannot_change_in_a_run_is_refused_in_any_case(command, started, options):
    line = refused(command("train", *RUN, "name=started", "resume=auto", "resume_changes=allow", *options))
    assert options[0].split("=")[0] in line
    assert "init=" in line


def test_an_allowed_change_is_applied_reported_and_recorded(command, started):
    folder, before = started
    options = ["schedule.base_lr=0", "schedule.weight_decay=0.3", "resume_changes=allow", "schedule.max_steps=3"]
    answer = command("train", *RUN, f"resume={folder}/checkpoints/last.ckpt", "name=changed", *options)
    assert answer.status == 0, answer.err
    log = (answer.folder / "train.log").read_text()
    assert " and 0 here; schedule.weight_decay is " in log
    assert " and 0.3 here; the values here are used from step 2" in log
    after = last_checkpoint(answer.folder)
    # With a learning rate of 0, no weight changes.
    assert after["global_step"] == 3
    assert all(torch.equal(after["state_dict"][name], value) for name, value in before["state_dict"].items())
    assert after["hyper_parameters"]["recipe"]["schedule.base_lr"] == 0
    assert [group["weight_decay"] for group in after["optimizer_states"][0]["param_groups"]] == [0.3, 0.0, 0.0]


def test_milestones_and_intervals_may_change(command, started):
    folder, before = started
    options = ["schedule.milestones=[1]", "schedule.val_interval=1", "checkpoint_interval=1", "schedule.max_steps=3"]
    answer = command("train", *RUN, f"resume={folder}/checkpoints/last.ckpt", "name=milestone", *options)
    assert answer.status == 0, answer.err
    rates = [c["optimizer_states"][0]["param_groups"][0]["lr"] for c in (before, last_checkpoint(answer.folder))]
    assert rates[1] == pytest.approx(rates[0] / 10)
