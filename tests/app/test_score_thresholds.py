"""Score thresholds per class: stored by train, computed by eval, used by predict."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import refused
from small_run import SMALL

from cpm_rcnn import load
from cpm_rcnn.errors import UserError
from cpm_rcnn.training.module import DetectionModule

# More steps would be needed for good detections; with a low threshold there are some.
LEARNING = ["schedule.max_steps=6", "schedule.val_interval=3", "schedule.base_lr=0.05", "detector.proposals_test=100"]


@pytest.fixture
def learned(command, workplace):
    """The folder of a run with two validations."""
    folder = workplace / "outputs/learned"
    if not folder.exists():
        answer = command(
            "train", *SMALL, *LEARNING, "name=learned", "operating_precision=0.05", "detector.score_threshold=0"
        )
        assert answer.status == 0, answer.err
    return folder


def points_of(folder):
    return json.loads((folder / "operating_points.json").read_text())


@pytest.fixture
def last(learned):
    """The last checkpoint of that run."""
    return learned / "checkpoints/last.ckpt"


@pytest.fixture
def with_points(last, tmp_path):
    """Write that checkpoint with other operating points: ``with_points(classes=...)``; None removes them."""

    def write(target_precision=0.75, **classes):
        checkpoint = torch.load(last, weights_only=True)
        known = {name: {**each, "best_f1": None, "precision": None} for name, each in classes_of(checkpoint).items()}
        for name, (best_f1, precision) in classes.items():
            known[name] |= {"best_f1": point(best_f1), "precision": point(precision)}
        checkpoint["operating_points"] = {"iou": 0.5, "target_precision": target_precision, "classes": known}
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return write


def classes_of(checkpoint):
    return checkpoint["operating_points"]["classes"]


def point(threshold):
    return None if threshold is None else {"threshold": threshold, "precision": 0.8, "recall": 0.5, "f1": 0.6}


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_checkpoint_has_the_operating_points_that_eval_computes_for_its_weights(command, learned, name):
    path = learned / f"checkpoints/{name}.ckpt"
    stored = torch.load(path, weights_only=True)["operating_points"]
    answer = command("eval", f"ckpt={path}", "trainer=cpu", "operating_precision=0.05")
    assert answer.status == 0, answer.err
    assert stored == points_of(answer.folder) == load(path).operating_points
    assert stored["target_precision"] == 0.05
    assert any(each["best_f1"] for each in stored["classes"].values())


def test_best_and_last_have_those_of_different_validations(learned):
    best, last = (torch.load(learned / f"checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert (best["global_step"], last["global_step"]) == (3, 6)
    assert classes_of(best) != classes_of(last)


def test_a_checkpoint_before_a_validation_and_one_between_validations_have_none(command, monkeypatch, workplace):
    path = workplace / "outputs/watched/checkpoints/last.ckpt"
    seen = []

    def note(where):
        if path.exists():
            stored = torch.load(path, weights_only=True)
            seen.append((where, stored["global_step"], "operating_points" in stored))

    for hook in ("validation_step", "training_step"):
        original = getattr(DetectionModule, hook)
        monkeypatch.setattr(
            DetectionModule, hook, lambda *args, _hook=hook, _original=original: note(_hook) or _original(*args)
        )
    options = ["schedule.max_steps=5", "schedule.val_interval=2", "checkpoint_interval=1", "data.eval_batch_size=8"]
    assert command("train", *SMALL, *options, "name=watched").status == 0
    note("end")
    assert seen == [
        *(("training_step", 1, False), ("validation_step", 2, False), ("training_step", 2, True)),
        *(("training_step", 3, False), ("validation_step", 4, False), ("training_step", 4, True)),
        # At the end, the best checkpoint is validated again.
        *(("validation_step", 5, False), ("validation_step", 5, True), ("end", 5, True)),
    ]


def test_a_resumed_run_stores_those_of_its_own_validations(command, workplace):
    run = [*SMALL, "schedule.val_interval=2", "name=extended"]
    path = workplace / "outputs/extended/checkpoints/last.ckpt"
    answers = []
    for options in (["schedule.max_steps=2"], ["schedule.max_steps=3", "resume=auto", "operating_precision=0.5"]):
        answer = command("train", *run, *options)
        assert answer.status == 0, answer.err
        answers.append(torch.load(path, weights_only=True))
    assert [each["operating_points"]["target_precision"] for each in answers] == [0.9, 0.5]


def drawn(command, path, *options):
    answer = command("predict", f"ckpt={path}", "source=data/shapes/val/000001.jpg", "device=cpu", *options)
    assert answer.status == 0, answer.err
    return answer, (answer.folder / "images/000001.jpg.png").read_bytes()


def test_predict_draws_at_the_thresholds_of_the_checkpoint(command, with_points):
    path = with_points(circle=(0.2, 0.9), square=(0.0, None), star=(1.0, 0.0), triangle=(1.0, 1.0), cross=(1.0, 1.0))
    scores = [row["score"] for row in json.loads((drawn(command, path)[0].folder / "detections.json").read_text())]
    assert len(scores) > 10
    pictures = {score: drawn(command, path, f"min_score={score}")[1] for score in ("auto", "precision", 0.0, 1.0)}
    assert len(set(pictures.values())) == 4
    detector = load(path)
    assert detector.thresholds("best_f1") == [0.2, 0.0, 1.0, 1.0, 1.0]
    assert detector.thresholds("precision") == [0.9, float("inf"), 1.0, 0.0, 1.0]


def test_predict_names_classes_without_a_threshold(command, with_points):
    path = with_points(circle=(0.2, 0.9), square=(0.1, None))
    answer, _ = drawn(command, path, "min_score=auto")
    assert "min_score=auto: no threshold for triangle, star, cross; 0.3 is used" in answer.out
    answer, _ = drawn(command, path, "min_score=precision")
    assert "min_score=precision: no threshold for square, triangle, star, cross; not drawn" in answer.out


def test_predict_says_that_thresholds_do_not_know_overridden_settings(command, with_points):
    path = with_points(circle=(0.2, 0.9))
    options = ("detector.ism=false", "data.test_short_side=90", "multi_scale=on", "multi_scale.scales=[1.0]")
    answer, _ = drawn(command, path, "min_score=auto", *options)
    assert (
        "measured in a validation without detector.ism, data.test_short_side, multi_scale, and may not suit it"
        in answer.out
    )


def test_predict_refuses_thresholds_that_the_checkpoint_does_not_have(command, with_points, last, tmp_path):
    source = ["source=data/shapes/val", "device=cpu"]
    path = with_points(target_precision=None)
    line = refused(command("predict", f"ckpt={path}", *source, "min_score=precision"))
    assert "min_score=precision: the operating points have no target precision" in line
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["operating_points"]
    torch.save(checkpoint, tmp_path / "none.ckpt")
    line = refused(command("predict", f"ckpt={tmp_path / 'none.ckpt'}", *source, "min_score=auto"))
    assert f"min_score=auto: ckpt={tmp_path / 'none.ckpt'} has no operating points; train stores them" in line
    assert load(tmp_path / "none.ckpt").operating_points is None


@pytest.mark.parametrize(
    "value",
    [
        *(3, [], {}, {"iou": 0.5}, {"iou": 0.5, "target_precision": None, "classes": {"circle": {"id": 1}}}),
        {"iou": 0.5, "target_precision": 2, "classes": {}},
        {
            "iou": 0.5,
            "target_precision": None,
            "classes": {"circle": {"id": [], "objects": 1, "best_f1": None, "precision": None}},
        },
        {
            "iou": 0.5,
            "target_precision": None,
            "classes": {"circle": {"id": 1, "objects": 1, "best_f1": point(float("nan")), "precision": None}},
        },
    ],
)
def test_damaged_operating_points_are_refused(last, tmp_path, value):
    checkpoint = torch.load(last, weights_only=True)
    torch.save({**checkpoint, "operating_points": value}, tmp_path / "damaged.ckpt")
    with pytest.raises(UserError, match=r"damaged\.ckpt: its operating points are damaged$"):
        load(tmp_path / "damaged.ckpt")


def test_other_values_of_the_options_are_refused(command, last):
    ckpt = f"ckpt={last}"
    line = refused(command("predict", ckpt, "source=data/shapes/val", "min_score=best"))
    assert "min_score=best: must be a number, 0 to 1, auto (best F1 per class) or precision" in line
    assert "min_score=" in refused(command("predict", ckpt, "source=data/shapes/val", "min_score=[0.1]"))
    for name, options in (("eval", [ckpt, "trainer=cpu"]), ("train", SMALL)):
        line = refused(command(name, *options, "operating_precision=90"))
        assert "operating_precision=90: must be a number, 0 to 1" in line


def test_two_processes_write_the_operating_points_of_one(command, last, workplace):
    options = [f"ckpt={last}", "trainer=cpu", "operating_precision=0.05", "data.eval_batch_size=1", "details=true"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = command("eval", *options)
    torch.set_num_threads(threads)
    two = subprocess.run(
        [sys.executable, "-m", "cpm_rcnn.eval", *options, "trainer.devices=2", "trainer.strategy=ddp"],
        cwd=workplace,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert two.returncode == 0, two.stderr
    folder = Path(two.stdout.strip().splitlines()[-1])
    assert points_of(folder) == points_of(one.folder)
    rows = [sorted(map(str, json.loads((f / "detections.json").read_text()))) for f in (one.folder, folder)]
    assert rows[0] == rows[1]
    assert "rsm_probability" in rows[0][0]


def test_a_split_without_annotations_has_no_operating_points(command, last, workplace):
    content = json.loads((workplace / "data/shapes/annotations/instances_val.json").read_text())
    del content["annotations"]
    (workplace / "no_objects.json").write_text(json.dumps(content))
    answer = command("eval", f"ckpt={last}", "trainer=cpu", "split=no_objects.json", "images=data/shapes/val")
    assert answer.status == 0, answer.err
    assert not (answer.folder / "operating_points.json").exists()
