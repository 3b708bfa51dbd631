"""``check``, and what ``train`` says about its data."""

import json
import re
import shutil

import pytest
from runs import refused

from faulty_data import plant_faults, write_clean

CHECK = ["experiment=quickstart", "data.train_count=60", "data.val_count=30"]


@pytest.fixture(scope="module")
def clean(workplace):
    return write_clean(workplace / "clean")


@pytest.fixture(scope="module")
def faulty(clean, workplace):
    """A copy of the clean data with faults, and what must be found."""
    root = shutil.copytree(clean, workplace / "faulty")
    (root / "shapes.json").unlink()
    return root, plant_faults(root)


def test_clean_data_have_no_findings_and_status_0(command, clean):
    answer = command("check", *CHECK, "data.root=clean")
    assert answer.status == 0, answer.err
    assert "Nothing was found." in answer.out
    assert "train: 60 images" in answer.out
    content = json.loads((answer.folder / "check.json").read_text())
    assert (content["faults"], content["warnings"], content["notes"], content["findings"]) == (0, 0, 0, [])
    assert content["classes"][0]["name"] == "circle"


@pytest.fixture(scope="module")
def checked():
    return {}


@pytest.fixture
def answer(command, faulty, checked):
    """The answer of the check of the faulty data, which tests share."""
    if not checked:
        sizes = [argument for argument in CHECK if argument.startswith("experiment")]
        checked["answer"] = command("check", *sizes, "data=custom", f"data.root={faulty[0]}")
    return checked["answer"]


def test_faults_are_listed_in_a_table_with_status_1(answer, faulty):
    assert answer.status == 1
    assert "error" not in answer.err
    assert "ends early" not in answer.err
    found = json.loads((answer.folder / "check.json").read_text())
    assert f"{found['faults']} faults, {found['warnings']} warnings, {found['notes']} notes" in answer.out
    for severity, *_ in faulty[1]:
        assert re.search(rf"│ {severity}\b", answer.out)


def test_options_are_named_by_their_config_keys(answer):
    assert "'data.classes=[circle,square,triangle,star,cross,hexagon,heart,moon]'" in answer.out
    advice = {finding["advice"] for finding in json.loads((answer.folder / "check.json").read_text())["findings"]}
    assert "Correct the file, or skip these entries with data.on_error=skip." in advice


def test_the_page_shows_each_example_and_needs_no_other_file(answer, faulty):
    page = (answer.folder / "check.html").read_text()
    for _, _, place, name, _ in faulty[1]:
        assert place in page
        assert name in page
    assert page.count('src="data:image/jpeg;base64,') > 10
    assert "000002.jpg not found" in page
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|<script src|<iframe", page)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["data=custom", "data.root=nosuch"], "data.root=nosuch: no such folder"),
        (["data=custom", "data.root=null"], "data.root=null: give the folder of the data"),
        (["detector.anchor_sizes=[1,2]"], "detector.anchor_sizes=[1, 2]: must be a list of 5 values"),
        (["schedule.short_sides=[0]"], "schedule.short_sides=0: must be an integer, at least 1"),
    ],
)
def test_invalid_options_give_one_line_and_status_2(command, clean, arguments, line):
    assert line in refused(command("check", "experiment=quickstart", "data.root=clean", *arguments))


def test_a_training_prints_its_most_important_findings_about_the_annotations(trained):
    lines = re.findall(r"^(?:fault|warning|note): .*", trained.out, re.M)
    assert 1 <= len(lines) <= 5
    assert "fewer than 10 training objects (" in lines[0]
    assert "python -m cpm_rcnn.check with the arguments of this training" in trained.out
