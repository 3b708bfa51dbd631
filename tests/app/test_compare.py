"""``compare`` on folders of ``eval`` and on files of detections."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import refused

from cpm_rcnn import compare as module
from cpm_rcnn.commands.compare import _names
from cpm_rcnn.evaluation.bootstrap import AP_METRICS

_folders = {}


@pytest.fixture
def folders(command, checkpoint):
    """Two folders of ``eval``, of the same checkpoint with different settings, which all tests share."""
    if not _folders:
        for name, more in (("first", "0.01"), ("second", "0.3")):
            answer = command("eval", f"ckpt={checkpoint}", "trainer=cpu", f"detector.score_threshold={more}")
            assert answer.status == 0, answer.err
            _folders[name] = answer.folder
        # A model this small finds nothing. Detections near the objects replace its detections in one of the two.
        path = _folders["first"] / "detections.json"
        _folders["found"] = truth_as_detections(_folders["first"])
        path.write_text(json.dumps(_folders["found"]))
    return _folders["first"], _folders["second"]


def truth_as_detections(folder):
    """Detections that are the objects, some of them moved."""
    truth = json.loads(Path(record(folder)["annotations"]).read_text())
    rng = np.random.default_rng(0)
    return [
        {
            "image_id": item["image_id"],
            "category_id": item["category_id"],
            "bbox": [item["bbox"][0] + item["bbox"][2] * float(rng.choice([0, 0.2])), *item["bbox"][1:]],
            "score": float(rng.random()),
        }
        for item in truth["annotations"]
    ]


def record(folder):
    return json.loads((folder / "evaluated.json").read_text())


def copy_of(folder, target, **changes):
    """A copy of an eval folder with other values in its record."""
    target.mkdir()
    (target / "detections.json").write_text((folder / "detections.json").read_text())
    (target / "evaluated.json").write_text(json.dumps(record(folder) | changes))
    return target


def test_eval_records_what_it_was_run_on(folders, workplace):
    content = record(folders[0])
    assert content["annotations"] == str(workplace / "data/shapes/annotations/instances_val.json")
    assert content["images"] == len(content["image_ids"]) == 5
    assert [category["name"] for category in content["categories"]]
    assert len(content["sha256"]) == 64


def test_two_folders_as_arguments(command, folders, workplace):
    answer = command("compare", *map(str, folders), "samples=20", "name=compared")
    assert answer.status == 0, answer.err
    assert answer.folder == workplace / "outputs" / "compared"
    for name in AP_METRICS:
        assert name in answer.out
    content = json.loads((answer.folder / "comparison.json").read_text())
    assert (content["images"], content["samples"], content["seed"]) == (5, 20, 0)
    assert [each["source"] for each in content["runs"]] == list(map(str, folders))
    metrics = json.loads((folders[1] / "metrics.json").read_text())
    for name in AP_METRICS:
        value = content["runs"][1]["metrics"][name]["value"]
        assert (-1 if value is None else value) == pytest.approx(metrics[name], abs=1e-12)
    for name, value in metrics["per_class"].items():
        found = content["runs"][1]["per_class"][name]["value"]
        assert (-1 if found is None else found) == pytest.approx(value, abs=1e-12)
    difference = content["runs"][1]["metrics"]["AP"]["difference"]
    assert difference["low"] <= difference["value"] <= difference["high"] < 0
    page = (answer.folder / "comparison.html").read_text()
    assert "<svg" in page
    assert "http" not in page


def test_the_same_comparison_gives_the_same_numbers_and_another_seed_others(command, folders):
    def numbers(*arguments):
        answer = command("compare", *arguments, "samples=20")
        return json.loads((answer.folder / "comparison.json").read_text())["runs"]

    runs = f"runs=[{','.join(map(str, folders))}]"
    assert numbers(runs) == numbers(*map(str, folders))
    assert numbers(runs) != numbers(runs, "seed=1")


def test_main_reads_its_arguments_from_the_command_line(folders, workplace, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, folders), "samples=3"])
    module.main()
    assert "comparison.json" in {path.name for path in (workplace / capfd.readouterr().out.split()[-1]).iterdir()}


def test_files_of_detections_need_the_annotation_file(command, folders):
    files = [str(folder / "detections.json") for folder in folders]
    line = refused(command("compare", *files))
    assert "annotations=FILE" in line
    answer = command("compare", *files, f"annotations={record(folders[0])['annotations']}", "samples=5")
    assert answer.status == 0, answer.err
    # A folder and a file can be compared.
    answer = command("compare", files[0], str(folders[1]), f"annotations={record(folders[0])['annotations']}")
    assert answer.status == 0, answer.err


def test_other_images_annotation_files_and_classes_are_refused_with_both_names(command, folders, tmp_path):
    content = record(folders[0])
    fewer = copy_of(folders[1], tmp_path / "fewer", image_ids=content["image_ids"][1:])
    other = tmp_path / "other.json"
    file = copy_of(folders[1], tmp_path / "file", annotations=str(other), sha256="0" * 64)
    classes = copy_of(folders[1], tmp_path / "classes", categories=content["categories"][1:])
    for wrong, parts in (
        (fewer, ["different images", "5 and 4, 4 in both"]),
        (file, ["different annotation files", content["annotations"], str(other)]),
        (classes, ["different classes"]),
    ):
        line = refused(command("compare", str(folders[0]), str(wrong)))
        for part in (str(folders[0]), str(wrong), *parts):
            assert part in line


def test_a_subset_of_the_images_is_compared_on_this_subset(command, folders, tmp_path):
    ids = record(folders[0])["image_ids"][:3]
    copies = [copy_of(folder, tmp_path / name, image_ids=ids) for folder, name in zip(folders, "ab")]
    line = refused(command("compare", *map(str, copies)))
    assert "which was not evaluated" in line
    for copy in copies:
        rows = json.loads((copy / "detections.json").read_text())
        (copy / "detections.json").write_text(json.dumps([row for row in rows if row["image_id"] in ids]))
    answer = command("compare", *map(str, copies), "samples=5")
    content = json.loads((answer.folder / "comparison.json").read_text())
    assert content["images"] == 3
    assert [run["name"] for run in content["runs"]] == ["a", "b"]


def test_an_annotation_file_that_is_missing_or_has_changed_is_named(command, folders, tmp_path):
    moved = tmp_path / "val.json"
    copies = [copy_of(folder, tmp_path / name, annotations=str(moved)) for folder, name in zip(folders, "ab")]
    arguments = ["compare", *map(str, copies)]
    assert f"{moved} does not exist" in refused(command(*arguments))
    original = record(folders[0])["annotations"]
    assert command(*arguments, f"annotations={original}", "samples=2").status == 0
    moved.write_text(Path(original).read_text() + " ")
    assert str(moved) in refused(command(*arguments))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "runs: must be given, for example runs=[outputs/"),
        (["data"], "two or more"),
        (["data", "nosuch"], "data: is not a folder of eval"),
        (["nosuch", "data"], "nosuch: no such folder"),
        (["data", "runs=[data]"], "not both"),
        (["data", "data", "samples=0"], "samples=0: must be an integer, at least 1"),
        (["data", "data", "seed=-1"], "seed=-1: must be an integer"),
        (["data", "data", "annotations=nosuch"], "annotations=nosuch: no such file"),
        (["runs=data"], "runs=data: must be a list"),
        (["runs=null"], "runs=null: must be a list"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(command, folders, arguments, part):
    assert part in refused(command("compare", *arguments))


@pytest.mark.parametrize(
    "content", ["[", "{}", "[1]", '[{"image_id": 1}]', '[{"image_id": 1, "category_id": 1, "bbox": [1], "score": 1}]']
)
def test_an_invalid_file_of_detections_is_refused(command, folders, tmp_path, content):
    wrong = copy_of(folders[1], tmp_path / "wrong")
    (wrong / "detections.json").write_text(content)
    assert str(wrong / "detections.json") in refused(command("compare", str(folders[0]), str(wrong)))


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["x/a", "y/b"], ["a", "b"]),
        (["x/a/detections.json", "b.json"], ["a", "b.json"]),
        (["x/a/0", "x/b/0", "x/c"], ["a/0", "b/0", "c"]),
        (["x/a", "x/a"], ["1: a", "2: a"]),
    ],
)
def test_runs_are_named_by_what_differs_in_their_paths(sources, names):
    assert _names(list(map(Path, sources))) == names


def test_help_names_the_positional_arguments(command):
    assert "usage: python -m cpm_rcnn.compare RUN RUN ... [OPTION=VALUE ...]" in command("compare", "--help").out
