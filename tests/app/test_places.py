"""Where a run writes: folders without permission, full disks, loggers that fail."""

import errno
import os
from collections import namedtuple

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from runs import refused
from small_run import SMALL

from cpm_rcnn.errors import UserError
from cpm_rcnn.training.checkpoint_io import AtomicCheckpointIO

RUN = [*SMALL, "schedule.max_steps=2", "schedule.val_interval=2", "sheet_images=0"]
Usage = namedtuple("Usage", "total used free")


def test_too_little_disk_space_for_the_checkpoints_is_refused_before_training(command, monkeypatch, workplace):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**12, 10**12 - 10**6, 10**6))
    line = refused(command("train", *RUN, "name=no_room"))
    assert "0.00 GB are free" in line
    assert not (workplace / "outputs/no_room/metrics.csv").exists()


def test_a_run_folder_that_is_a_file_gives_one_line(command, workplace):
    (workplace / "outputs").mkdir(exist_ok=True)
    (workplace / "outputs/taken").write_text("a file")
    assert "outputs/taken" in refused(command("train", *RUN, "name=taken"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_read_only_folder_gives_one_line(command, workplace):
    folder = workplace / "outputs/read_only"
    folder.mkdir(parents=True, mode=0o500)
    assert "read_only" in refused(command("train", *RUN, "name=read_only/run"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("inline_container.cc:672")]
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one_intact(tmp_path, monkeypatch, error):
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints/last.ckpt"
    io.save_checkpoint({"step": torch.tensor(1)}, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"last\.ckpt: cannot be written .*the previous checkpoint is intact"):
        io.save_checkpoint({"step": torch.tensor(2)}, path)
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["step"] == 1


@pytest.mark.parametrize("method", ["log_metrics", "save", "log_hyperparams", "finalize"])
def test_a_logger_that_fails_later_does_not_end_the_training(command, monkeypatch, method):
    def fail(self, *args, **kwargs):
        raise ConnectionError("the service is gone")

    monkeypatch.setattr(CSVLogger, method, fail)
    monkeypatch.setattr("cpm_rcnn.commands.train.plot_curves", lambda *paths: None)
    answer = command("train", *RUN, f"name=without_{method}")
    assert answer.status == 0, answer.err
    assert (answer.out + answer.err).count("the service is gone") == 1
    assert (answer.folder / "checkpoints/last.ckpt").is_file()


def test_a_logger_that_cannot_start_gives_one_line_before_training(command, monkeypatch):
    def unreachable(self):
        raise ConnectionError("no route to the service")

    monkeypatch.setattr(CSVLogger, "experiment", property(unreachable))
    assert "CSVLogger cannot start (ConnectionError: no route" in refused(command("train", *RUN, "name=no_logger"))
