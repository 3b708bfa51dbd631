"""``data=custom`` on a folder in VOC's format: training, evaluation and comparison with a held-out validation split."""

import json
import shutil

import pytest
from runs import last_checkpoint, metrics, refused, same_run
from small_run import SMALL

from dataset_folders import shapes, write_voc

RUN = [
    *(argument for argument in SMALL if not argument.startswith(("data.train_count", "data.val_count"))),
    *("data=custom", "data.root=voc", "data.val_fraction=0.3", "data.negatives=0.3"),
    *("data.classes=[star,{box:[square,cross]}]", "sheet_images=0"),
]


@pytest.fixture(scope="module")
def folder(workplace):
    """VOC's format without splits, in which every fourth image is empty."""
    contents = shapes(workplace / "voc_source", 14, 1)
    train = contents["train"]
    empty = {image["id"] for image in train["images"][::4]}
    train["annotations"] = [entry for entry in train["annotations"] if entry["image_id"] not in empty]
    write_voc(workplace / "voc", workplace / "voc_source", {"train": train}, "kangaroo")
    return workplace / "voc"


@pytest.fixture(scope="module")
def trained(folder):
    return {}


@pytest.fixture
def run(command, trained):
    """The folder of an uninterrupted run, which all tests share."""
    if not trained:
        answer = command("train", *RUN, "name=whole")
        assert answer.status == 0, answer.err
        trained["run"] = answer.folder
    return trained["run"]


def test_a_held_out_split_is_evaluated_from_the_checkpoint_and_compared(command, run, workplace):
    evaluated = command("eval", f"ckpt={run}", "trainer=cpu", "name=first")
    assert evaluated.status == 0, evaluated.err
    found = metrics(run)
    assert metrics(evaluated.folder) == {name: found[name] for name in metrics(evaluated.folder)}
    record = json.loads((evaluated.folder / "evaluated.json").read_text())
    annotations = json.loads((evaluated.folder / record["annotations"]).read_text())
    assert len(annotations["images"]) == 4
    assert [category["name"] for category in annotations["categories"]] == ["star", "box"]
    # Folders of eval can be moved, and their annotations move with them.
    shutil.copytree(evaluated.folder, workplace / "moved")
    compared = command("compare", "moved", str(evaluated.folder), "samples=5", "name=compared")
    assert compared.status == 0, compared.err


def test_a_run_that_resumes_ends_like_one_that_was_not_interrupted(command, run):
    assert command("train", *RUN, "schedule.max_steps=2", "name=parts").status == 0
    resumed = command("train", *RUN, "name=parts", "resume=auto")
    assert resumed.status == 0, resumed.err
    assert same_run(last_checkpoint(resumed.folder), last_checkpoint(run))


def test_a_run_does_not_resume_with_another_split_or_other_classes(command, run):
    for change in ("data.split_seed=1", "data.val_fraction=0.4", "data.negatives=0.2"):
        assert change.partition("=")[0] in refused(command("train", *RUN, change, "name=whole", "resume=auto"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "data.root=null: give the folder of the data, data.root=FOLDER, or its files, data.train_json="),
        (["data.root=nowhere"], "data.root=nowhere: no such folder"),
        (["data.root=voc", "data.format=cvat"], "data.format=cvat: no annotations.xml with images/ in voc, which has"),
        (["data.root=voc"], "data.root=voc: has no val split in voc format (annots/*.xml); add one or hold out a part"),
        (["data.root=voc", "data.classes=[sta]"], "data.classes: voc/annots has no class sta (did you mean star?)"),
        (["data.val_json=a.json"], "data.train_json=null: give the training annotations and images, data.train_json="),
        (["data.root=voc", "data.val_fraction=.2", "data.negatives=1"], "data.negatives=1: must be below 1"),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_line_with_their_keys(command, folder, arguments, line):
    assert refused(command("train", "data=custom", *arguments)).startswith(f"error: {line}")
