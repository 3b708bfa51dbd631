"""Checkpoint files: their format number, and errors for files that cannot be used."""

import pickle

import pytest
import torch

import cpm_rcnn
from cpm_rcnn.errors import UserError
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.weights.checkpoints import (
    FORMAT,
    checkpoint_file,
    class_names,
    detector_state,
    read_checkpoint,
    write_checkpoint,
)
from cpm_rcnn.weights.initialize import initialize
from cpm_rcnn.weights.resume import find_resume_point
from small_models import change_checkpoint, is_plain, same_values, small_module, write_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    return path, write_trained(path)


def test_a_checkpoint_contains_the_format_the_classes_and_the_weights(trained):
    path, module = trained
    checkpoint = read_checkpoint(path)
    assert checkpoint["hyper_parameters"]["format"] == FORMAT
    assert class_names(checkpoint) == ["cat", "dog"]
    assert same_values(detector_state(checkpoint), module.model.state_dict())


def load(path):
    cpm_rcnn.load(path)


def initialize_from(path):
    initialize(small_module().model, ["cat", "dog"], init=path)


def resume(path):
    find_resume_point(str(path), path.parent)


READERS = [(load, "path"), (initialize_from, "init"), (resume, "resume")]


@pytest.mark.parametrize(("read", "argument"), READERS)
@pytest.mark.parametrize(
    ("number", "found"), [(..., "written before format numbers, by version 0.1.0 or earlier"), (99, "format 99")]
)
def test_another_format_is_refused_in_one_line(trained, tmp_path, read, argument, number, found):
    path = change_checkpoint(trained[0], tmp_path / "other.ckpt", format=number)
    with pytest.raises(UserError, match=rf"^{argument}=.*other\.ckpt: ") as caught:
        read(path)
    assert found in str(caught.value)
    assert f"this version reads format {FORMAT}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_from_checkpoint_refuses_another_format(trained, tmp_path):
    path = change_checkpoint(trained[0], tmp_path / "other.ckpt", format=99)
    with pytest.raises(UserError, match="of checkpoint format 99; this version reads format"):
        DetectionModule.load_from_checkpoint(path)


def damaged(path, kind, folder):
    file = folder / "damaged.ckpt"
    content = path.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flipped bit":
        half = len(content) // 2
        file.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("not a checkpoint")
    elif kind == "code":
        file.write_bytes(pickle.dumps(print))
    elif kind == "folder":
        file.mkdir()
    elif kind == "weights only":
        torch.save({"layer.weight": torch.zeros(2)}, file)
    elif kind == "classes without names":
        change_checkpoint(path, file, categories=[{"id": 1}, {"id": 2}])
    elif kind == "no classes":
        change_checkpoint(path, file, categories=[])
    elif kind == "model of another type":
        change_checkpoint(path, file, model=["tiny"])
    elif kind == "unknown setting":
        change_checkpoint(path, file, model={"backbone": {"name": "tiny"}, "color": "red"})
    return file


@pytest.mark.parametrize(
    ("report", "taken"),
    [('{"selected": "last"}', "last"), ('{"selected": "best"}', "best"), ('{"AP": 0.1}', "best"), ("[]", "best")],
)
def test_of_a_run_s_folder_the_checkpoint_that_it_reports_is_taken(tmp_path, report, taken):
    (tmp_path / "checkpoints").mkdir()
    for name in ("best", "last"):
        (tmp_path / f"checkpoints/{name}.ckpt").touch()
    assert checkpoint_file(str(tmp_path), "ckpt").name == "best.ckpt"
    (tmp_path / "metrics.json").write_text(report)
    assert checkpoint_file(str(tmp_path), "ckpt").name == f"{taken}.ckpt"


KINDS = ["truncated", "flipped bit", "empty", "text", "code", "folder", "absent", "weights only"]
KINDS += ["classes without names", "no classes", "model of another type", "unknown setting"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_or_foreign_file_gives_one_line_that_names_it(trained, tmp_path, kind):
    file = damaged(trained[0], kind, tmp_path)
    with pytest.raises(UserError, match=r"^path=.*damaged\.ckpt: ") as caught:
        cpm_rcnn.load(file)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_the_stored_settings_are_listed(trained, tmp_path):
    checkpoint = torch.load(trained[0], weights_only=True)
    del checkpoint["state_dict"]["model.rpn.head.cls_logits.bias"]
    torch.save(checkpoint, tmp_path / "part.ckpt")
    with pytest.raises(
        UserError, match=r"^path=.*part\.ckpt: does not fit the model: 1 missing: rpn\.head\.cls_logits"
    ):
        cpm_rcnn.load(tmp_path / "part.ckpt")


@pytest.fixture
def written(tmp_path):
    """A checkpoint of weights that come from another program."""
    module = small_module()
    hyper_parameters = {name: value for name, value in module.hparams.items() if name != "format"}
    write_checkpoint(tmp_path / "converted.ckpt", module.model.state_dict(), hyper_parameters)
    return tmp_path / "converted.ckpt", module


@pytest.mark.parametrize("kind", ["trained", "written"])
def test_load_from_checkpoint_needs_no_argument_but_the_path(kind, request):
    path, module = request.getfixturevalue(kind)
    again = DetectionModule.load_from_checkpoint(path)
    assert same_values(again.state_dict(), module.state_dict())
    assert again.hparams == module.hparams
    assert again.detector.class_names == ["cat", "dog"]
    assert (again.detector.short_side, again.detector.max_size) == (64, 96)


@pytest.mark.parametrize("kind", ["trained", "written"])
def test_hyperparameters_are_plain_values(kind, request):
    path, _ = request.getfixturevalue(kind)
    hyper_parameters = read_checkpoint(path)["hyper_parameters"]
    assert set(hyper_parameters) == {"model", "categories", "schedule", "data", "format", "recipe"}
    assert is_plain(hyper_parameters)


def test_hyperparameters_contain_the_resolved_settings(trained):
    hyper_parameters = read_checkpoint(trained[0])["hyper_parameters"]
    # Options that the test did not give, so that a later version with other defaults builds the same model.
    assert hyper_parameters["model"]["nms_iou"] == 0.3
    assert hyper_parameters["model"]["backbone"]["input_format"]["order"] == "rgb"
    assert hyper_parameters["schedule"]["momentum"] == 0.9


def test_weights_without_training_state_cannot_be_resumed(written):
    path, _ = written
    with pytest.raises(UserError, match=r"^resume=.*: contains weights, but no training state; start .* with init="):
        find_resume_point(str(path), path.parent)
