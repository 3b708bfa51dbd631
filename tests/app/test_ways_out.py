"""Whatever ends a run, at most the step at hand is lost, and the run resumes to the weights of an undisturbed one."""

import errno
import multiprocessing
import os
import signal

import pytest
import torch
from runs import last_checkpoint, refused, same_run
from small_run import SMALL

from cpm_rcnn.training import interruption
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.training.throughput import Throughput

RUN = [*SMALL, "schedule.max_steps=5", "schedule.val_interval=3", "schedule.warmup_steps=2", "sheet_images=0"]
ACCUMULATED = ["trainer.accumulate_grad_batches=2", "schedule.max_steps=3", "schedule.val_interval=3"]
_whole = {}


@pytest.fixture
def whole(command):
    """The last checkpoint of an undisturbed run with these options."""

    def run(*options):
        if options not in _whole:
            answer = command("train", *RUN, *options, f"name=whole_{len(_whole)}")
            assert answer.status == 0, answer.err
            _whole[options] = last_checkpoint(answer.folder)
        return _whole[options]

    return run


@pytest.fixture
def once(monkeypatch):
    """Call ``act`` at the start of call number ``batch`` of a hook, once: ``once(owner, hook, act, batch)``."""

    def at(owner, hook, act, batch):
        original = getattr(owner, hook)
        calls = []

        def changed(*arguments):
            calls.append(arguments)
            if len(calls) == batch + 1:
                monkeypatch.setattr(owner, hook, original)
                act()
            return original(*arguments)

        monkeypatch.setattr(owner, hook, changed)

    return at


def resumed(command, name, *options):
    answer = command("train", *RUN, *options, f"name={name}", "resume=auto")
    assert answer.status == 0, answer.err
    return last_checkpoint(answer.folder)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("hook", "batch", "step", "times"),
    [
        ("training_step", 1, 2, 1),
        ("validation_step", 0, 3, 1),
        ("training_step", 4, 4, 2),  # the second one stops the run in the middle of its last step
    ],
)
def test_ctrl_c_saves_the_run_says_how_to_resume_and_exits_with_130(command, whole, once, hook, batch, step, times):
    name = f"ctrl_c_{hook}_{batch}"
    once(DetectionModule, hook, lambda: [interrupt() for _ in range(times)], batch)
    answer = command("train", *RUN, f"name={name}")
    assert answer.status == 130, answer.err
    assert f"stopped by SIGINT at step {step}; to resume, run the same command with name={name}" in answer.out
    assert last_checkpoint(answer.folder)["global_step"] == step
    assert same_run(resumed(command, name), whole())


def fail():
    raise RuntimeError("a defect")


@pytest.mark.parametrize(
    ("hook", "batch", "step", "options"),
    [
        ("on_train_batch_start", 2, 2, []),
        ("on_before_optimizer_step", 3, 3, []),
        ("on_train_batch_end", 3, 4, []),
        ("on_validation_start", 0, 3, []),
        ("on_train_batch_start", 3, 1, ACCUMULATED),  # the second of two batches of a step
    ],
)
def test_an_exception_in_a_callback_loses_no_finished_step(command, whole, once, workplace, hook, batch, step, options):
    name = f"failed_{hook}_{batch}"
    once(Throughput, hook, fail, batch)
    with pytest.raises(RuntimeError, match="a defect"):
        command("train", *RUN, *options, f"name={name}")
    assert last_checkpoint(workplace / "outputs" / name)["global_step"] == step
    log = (workplace / "outputs" / name / "train.log").read_text()
    assert f"the run is saved at step {step}; to resume, run the same command with name={name} resume=auto" in log
    assert same_run(resumed(command, name, *options), whole(*options))


def test_an_unreadable_validation_image_ends_the_run_after_a_checkpoint_and_says_how_to_skip_it(
    command, whole, workplace
):
    undisturbed = whole()
    image = next((workplace / "data/shapes/val").iterdir())
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    try:
        line = refused(command("train", *RUN, "name=faulty_image"))
        assert image.name in line
        assert "data.on_error=skip" in line
        assert last_checkpoint(workplace / "outputs/faulty_image")["global_step"] == 3
        assert same_run(resumed(command, "faulty_image", "data.on_error=skip"), undisturbed)
    finally:
        image.write_bytes(content)


def test_a_full_disk_loses_no_finished_step(command, whole, monkeypatch, workplace):
    folder = workplace / "outputs/full_disk/checkpoints"
    save, calls = torch.save, []

    def full(checkpoint, file):
        calls.append(file)
        # There is room for what was saved before, and for nothing else while the reserved space is allocated.
        if len(calls) >= 3 and (folder / "reserved_space").exists():
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        line = refused(command("train", *RUN, "name=full_disk", "checkpoint_interval=1"))
    assert "last.ckpt: cannot be written (" in line
    assert "No space left on device" in line
    assert last_checkpoint(folder.parent)["global_step"] == 3
    assert not (folder / "reserved_space").exists()
    assert same_run(resumed(command, "full_disk", "checkpoint_interval=1"), whole())


def test_a_checkpoint_is_written_before_a_validation(command, once, workplace):
    steps = []
    path = workplace / "outputs/before/checkpoints/last.ckpt"
    once(DetectionModule, "validation_step", lambda: steps.append(torch.load(path)["global_step"]), 0)
    assert command("train", *RUN, "name=before").status == 0
    assert steps == [3]
    assert not path.with_name("reserved_space").exists()


def test_a_worker_that_the_terminal_interrupts_does_not_end_the_run(command, whole, once):
    def interrupt_children():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
        interrupt()

    once(DetectionModule, "training_step", interrupt_children, 1)
    answer = command("train", *RUN, "name=workers", "data.num_workers=2")
    assert answer.status == 130, answer.err
    assert same_run(resumed(command, "workers", "data.num_workers=2"), whole())


def test_disk_space_is_allocated_until_it_is_released(tmp_path):
    reserve = interruption.DiskReserve(tmp_path / "checkpoints/space", 2**20)
    reserve.allocate()
    assert os.stat(tmp_path / "checkpoints/space").st_blocks * 512 >= 2**20
    reserve.release()
    assert not list((tmp_path / "checkpoints").iterdir())
