"""The result of the checks of a data set, as text, JSON and HTML."""

import io
import json

import pytest
from rich.console import Console

from cpm_rcnn.data.doctor.examination import Examination
from cpm_rcnn.data.doctor.finding import Example, Finding, by_importance, percent
from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting.data_check import (
    examination_page,
    print_examination,
    print_training_findings,
    write_examination,
)
from sample_reports import awkward_examination, open_image


def printed(examination: Examination, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_examination(examination, console)
    return console.file.getvalue()


def test_names_with_markup_are_printed_as_they_are():
    text = printed(awkward_examination())
    assert "train/[red]a.jpg annotation 7 (3 x 4 pixels)" in text
    assert "1 fault, 1 warning, 0 notes" in text


def test_overrides_can_be_pasted_whatever_the_width():
    text = printed(awkward_examination(), width=40)
    assert "Overrides to consider: 'detector.anchor_sizes=[8,16,32,64,128]'\n" in text


def test_the_json_has_the_findings_with_their_examples(tmp_path):
    write_examination(awkward_examination(), tmp_path, None)
    content = json.loads((tmp_path / "check.json").read_text())
    assert (content["faults"], content["warnings"], content["notes"]) == (1, 1, 0)
    (example, _) = content["findings"][1]["examples"]
    assert (example["file"], example["id"], example["boxes"]) == ("[red]a.jpg", "annotation 7", [[5, 6, 3, 4]])


def test_images_of_both_splits_with_one_name_are_told_apart():
    opened = []

    def by_split(split, file_name):
        opened.append((split, file_name))
        return open_image("street/000001.jpg")

    page = examination_page(awkward_examination(), by_split)
    assert opened == [("train", "[red]a.jpg"), ("val", "[red]a.jpg")]
    assert page.count('src="data:image/jpeg;base64,') == 2


def test_an_image_that_cannot_be_read_is_replaced_by_the_reason():
    def missing(split, file_name):
        raise UserError("image [red]a.jpg not found")

    assert "image [red]a.jpg not found" in examination_page(awkward_examination(), missing)


def test_a_training_prints_five_lines_and_the_command_for_more(capsys):
    findings = [Finding("warning", "a", f"Sentence {k}.", k, override="x=[1,2]") for k in range(7)]
    print_training_findings(findings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [f"warning: Sentence {k}. To change: 'x=[1,2]'" for k in range(5)]
    assert len(lines) == 6
    print_training_findings([])
    assert capsys.readouterr().out == ""


def test_findings_are_sorted_by_severity_and_keep_their_order_otherwise():
    severities = ("note", "fault", "warning", "fault")
    found = by_importance(Finding(severity, str(k), "", 1) for k, severity in enumerate(severities))
    assert [finding.kind for finding in found] == ["1", "3", "2", "0"]


@pytest.mark.parametrize(("count", "text"), [(0, "0.0 %"), (1, "under 0.1 %"), (50, "0.5 %"), (2000, "20 %")])
def test_shares_are_short(count, text):
    assert percent(count, 10_000) == text


def test_an_example_names_the_split_of_an_image_and_only_the_path_of_a_file():
    assert str(Example("val", "a.jpg", size=(3, 4))) == "val/a.jpg"
    assert str(Example("val", "x/val.json", "image 3")) == "x/val.json image 3"
