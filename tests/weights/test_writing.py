"""Files appear complete or not at all."""

import errno
import os

import pytest
import torch

from cpm_rcnn.errors import UserError
from cpm_rcnn.training.checkpoint_io import AtomicCheckpointIO
from cpm_rcnn.weights.writing import write_atomically


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_under_its_name_only_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "file.bin"

    def write(file):
        file.write(b"first half, ")
        assert not target.exists()
        file.write(b"second half")

    write_atomically(target, write)
    assert target.read_bytes() == b"first half, second half"
    assert files(target.parent) == ["file.bin"]


def test_an_existing_file_is_replaced_only_when_the_new_one_is_complete(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        assert target.read_bytes() == b"old"

    write_atomically(target, write)
    assert target.read_bytes() == b"new"
    assert files(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyboardInterrupt()])
def test_an_exception_in_the_writer_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(target, write)
    assert target.read_bytes() == b"old"
    assert files(tmp_path) == ["file.bin"]


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_in_torch(file):
    raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0\nframe #0: ...")


@pytest.mark.parametrize(
    ("write", "reason"), [(full_disk, "No space left on device"), (fail_in_torch, "unexpected pos 64 vs 0")]
)
def test_a_full_disk_while_writing_gives_one_line_and_leaves_the_old_file(tmp_path, write, reason):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    with pytest.raises(UserError, match=r"file\.bin: cannot be written \(.*\); try again") as caught:
        write_atomically(target, write, "; try again")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"old"
    assert files(tmp_path) == ["file.bin"]


def test_a_full_disk_while_flushing_a_checkpoint_leaves_the_previous_one(tmp_path, monkeypatch):
    target = tmp_path / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 1}, target)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"last\.ckpt: cannot be written .*; the previous checkpoint is intact$"):
        plugin.save_checkpoint({"step": 2}, target)
    assert torch.load(target, weights_only=True) == {"step": 1}
    assert files(tmp_path) == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.bin: cannot be written"):
        write_atomically(tmp_path / "file" / "a.bin", lambda file: None)
