"""COCO metrics on the terminal and as JSON."""

import io
import json
import math

import pytest
from rich.console import Console

from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting.tables import print_metrics, write_metrics

METRICS = {
    **{"AP": 0.4123, "AP50": 0.6, "AP75": 0.45, "APs": -1.0, "APm": math.nan, "APl": 0.5},
    **{"AR1": 0.3, "AR10": 0.5, "AR100": 0.55, "ARs": 0.0, "ARm": 0.1, "ARl": 1.0},
    "per_class": {"cat": 0.25, "dog [old]": -1.0, "cow": 0.75, "hen": 0.5},
}


def _printed(metrics):
    console = Console(file=io.StringIO(), width=100)
    print_metrics(metrics, console)
    return console.file.getvalue()


def _rows(text):
    return [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def test_metrics_are_shown_in_percent_and_undefined_ones_as_a_dash():
    text = _printed(METRICS)
    assert "percent" in text
    rows = _rows(text)
    assert rows[0] == ["AP", "41.2", "AP50", "60.0", "AP75", "45.0"]
    assert rows[1] == ["APs", "–", "APm", "–", "APl", "50.0"]
    assert rows[3] == ["ARs", "0.0", "ARm", "10.0", "ARl", "100.0"]


def test_every_class_is_shown_with_its_name_unchanged():
    rows = _rows(_printed(METRICS))
    assert rows[4] == ["AP cat", "25.0", "AP dog [old]", "–", "AP cow", "75.0"]
    assert rows[5] == ["AP hen", "50.0", "", "", "", ""]


def test_the_json_contains_the_metrics_unrounded_and_null_for_nan(tmp_path):
    write_metrics(METRICS, tmp_path / "new" / "metrics.json")
    text = (tmp_path / "new" / "metrics.json").read_text()
    assert "NaN" not in text
    read = json.loads(text)
    assert read["AP"] == 0.4123
    assert read["APs"] == -1
    assert read["APm"] is None
    assert read["per_class"] == METRICS["per_class"]


def test_nan_of_a_class_becomes_null(tmp_path):
    write_metrics({"AP": math.nan, "per_class": {"cat": math.nan}}, tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text()) == {"AP": None, "per_class": {"cat": None}}


def test_a_path_that_cannot_be_written_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be written"):
        write_metrics(METRICS, tmp_path)
