"""Where a run writes: folders that cannot be written to, disks that are full, loggers that fail."""

import errno
import os
from collections import namedtuple

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from small_run import SMALL
from test_commands import refused

from cpm_rcnn.callbacks import AtomicCheckpointIO
from cpm_rcnn.errors import UserError

RUN = [*SMALL, "schedule.max_steps=2", "schedule.val_interval=2", "sheet_images=0"]
Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_training(command, monkeypatch, workplace):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**12, 10**12 - 10**6, 10**6))
    line = refused(command("train", *RUN, "name=no_room"))
    assert "0.00 GB are free" in line
    assert not (workplace / "outputs/no_room/metrics.csv").exists()


def test_a_folder_that_is_a_file_is_one_line(command, workplace):
    (workplace / "outputs").mkdir(exist_ok=True)
    (workplace / "outputs/taken").write_text("a file")
    assert "outputs/taken" in refused(command("train", *RUN, "name=taken"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(command, workplace):
    folder = workplace / "outputs/read_only"
    folder.mkdir(parents=True, mode=0o500)
    assert "read_only" in refused(command("train", *RUN, "name=read_only/run"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("inline_container.cc:672")]
)
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, monkeypatch, error):
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints/last.ckpt"
    io.save_checkpoint({"step": torch.tensor(1)}, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"last\.ckpt: cannot be written .*the checkpoint before is whole"):
        io.save_checkpoint({"step": torch.tensor(2)}, path)
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["step"] == 1


@pytest.mark.parametrize("method", ["log_metrics", "save", "log_hyperparams", "finalize"])
def test_a_logger_that_fails_later_does_not_take_the_training_with_it(command, monkeypatch, method):
    def fail(self, *args, **kwargs):
        raise ConnectionError("the service is gone")

    monkeypatch.setattr(CSVLogger, method, fail)
    monkeypatch.setattr("cpm_rcnn.train.plot_curves", lambda *paths: None)
    answer = command("train", *RUN, f"name=without_{method}")
    assert answer.status == 0, answer.err
    assert (answer.out + answer.err).count("the service is gone") == 1
    assert (answer.folder / "checkpoints/last.ckpt").is_file()


def test_a_logger_that_cannot_start_is_one_line_before_training(command, monkeypatch):
    def unreachable(self):
        raise ConnectionError("no route to the service")

    monkeypatch.setattr(CSVLogger, "experiment", property(unreachable))
    assert "CSVLogger cannot start (ConnectionError: no route" in refused(command("train", *RUN, "name=no_logger"))
