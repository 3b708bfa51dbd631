"""The checkpoint of a resumed run: which one, and how often it is read."""

import pytest
import torch

from cpm_rcnn.errors import UserError
from cpm_rcnn.training.checkpoint_io import AtomicCheckpointIO
from cpm_rcnn.weights.resume import check_same_run, find_resume_point
from small_models import CATEGORIES, TwoImages, same_values, small_module, small_trainer, write_trained


@pytest.fixture
def run_dir(tmp_path):
    """A run's folder with a checkpoint of two steps."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    write_trained(folder / "last.ckpt")
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """The files whose tensors were read, in order.

    ``resume=auto`` first looks at the step of every checkpoint. That maps the file into memory (``mmap=True``), so the
    tensors are not read, and it does not count. The comparison with the archive's checksums does not count either.
    """
    names, load = [], torch.load

    def counting(file, *arguments, **options):
        if not options.get("mmap"):
            names.append(str(file))
        return load(file, *arguments, **options)

    monkeypatch.setattr(torch, "load", counting)
    return names


@pytest.mark.parametrize("how", ["auto", "file"])
def test_a_resumed_run_reads_its_checkpoint_once(run_dir, reads, how):
    last = run_dir / "checkpoints/last.ckpt"
    point = find_resume_point("auto" if how == "auto" else str(last), run_dir)
    module = small_module(schedule={"max_steps": 4})
    check_same_run(point, module.model.settings, module.detector.categories)
    trainer = small_trainer(max_steps=4, plugins=[AtomicCheckpointIO(point)])
    trainer.fit(module, datamodule=TwoImages(), ckpt_path=point.path, weights_only=True)
    assert trainer.global_step == 4
    assert reads == [str(last)]


def test_the_known_content_is_used_for_its_own_path_only_and_once(run_dir, reads, tmp_path):
    point = find_resume_point("auto", run_dir)
    other = tmp_path / "other.ckpt"
    torch.save({"step": 7}, other)
    plugin = AtomicCheckpointIO(point)
    assert plugin.load_checkpoint(point.path) is point.checkpoint
    assert plugin.load_checkpoint(other) == {"step": 7}
    # The file may have been overwritten since.
    torch.save({"step": 9}, point.path)
    assert plugin.load_checkpoint(point.path) == {"step": 9}


def test_the_run_continues_from_the_weights_and_the_step_of_the_checkpoint(run_dir):
    point = find_resume_point("auto", run_dir)
    assert point.step == 2
    module = small_module(schedule={"max_steps": 2})
    trainer = small_trainer(plugins=[AtomicCheckpointIO(point)])
    trainer.fit(module, datamodule=TwoImages(), ckpt_path=point.path, weights_only=True)
    assert same_values(module.state_dict(), point.checkpoint["state_dict"])


def test_no_resume_and_no_checkpoint_start_at_step_0(tmp_path, caplog):
    assert find_resume_point(None, tmp_path) is None
    assert find_resume_point("auto", tmp_path) is None
    assert "resume=auto: no checkpoint in" in caplog.text


def with_step(path, step, target):
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "global_step": step}, target)


def test_auto_prefers_the_highest_step_then_last_and_skips_damaged_files(run_dir, caplog):
    folder = run_dir / "checkpoints"
    with_step(folder / "last.ckpt", 2, folder / "best.ckpt")
    assert find_resume_point("auto", run_dir).path.name == "last.ckpt"
    with_step(folder / "last.ckpt", 3, folder / "best.ckpt")
    assert find_resume_point("auto", run_dir).path.name == "best.ckpt"
    content = (folder / "best.ckpt").read_bytes()
    # The step at the beginning can still be read.
    (folder / "best.ckpt").write_bytes(content[:-5000])
    assert find_resume_point("auto", run_dir).path.name == "last.ckpt"
    (folder / "best.ckpt").write_bytes(content)
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    (folder / "best.ckpt").write_bytes(damaged)
    assert find_resume_point("auto", run_dir).path.name == "last.ckpt"
    assert "best.ckpt: cannot be read as weights" in caplog.text
    assert "; skipped" in caplog.text


def test_a_named_file_that_is_damaged_is_an_error(run_dir):
    last = run_dir / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"^resume=.*last\.ckpt: cannot be read"):
        find_resume_point(str(last), run_dir)
    with pytest.raises(UserError, match=r"^resume=.*none\.ckpt: no such file"):
        find_resume_point(str(run_dir / "none.ckpt"), run_dir)


def test_a_run_of_another_model_or_other_classes_is_refused(run_dir):
    point = find_resume_point("auto", run_dir)
    with pytest.raises(UserError, match=r"^resume=.*mlp_channels is 16 in the checkpoint and 24 in this model"):
        check_same_run(point, small_module(mlp_channels=24).model.settings, CATEGORIES)
    with pytest.raises(UserError, match=r"^resume=.*its classes differ"):
        check_same_run(point, small_module().model.settings, CATEGORIES[::-1])
    # How the model is trained and tested may change.
    changed = small_module(samples=64, score_threshold=0.2, proposals_test=5)
    check_same_run(point, changed.model.settings, CATEGORIES)


@pytest.mark.parametrize("value", [3, ["a"]])
def test_a_value_that_is_not_a_path_is_refused_in_one_line(value, tmp_path):
    with pytest.raises(UserError, match=r"^resume=.*: must be a path$"):
        find_resume_point(value, tmp_path)
