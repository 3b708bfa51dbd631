"""The table of a sweep, made from the folders of its cells."""

import csv
import io
import json

import pytest
from PIL import Image
from rich.console import Console

from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting.sweep import Cell, read_cell, read_sweep, report_sweep, write_record

ON = {"cmm": "on", "ism": "on", "rsm": "on"}


def make_cell(sweep, number, *overrides, ap=0.4, minutes=2.0, choices=ON, seed=0, status="finished", error=None):
    folder = sweep / f"{number}_cell"
    folder.mkdir(parents=True)
    write_record(Cell(folder, number, overrides, dict(choices), seed, status, error))
    if status == "finished":
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        metrics = {name: None if ap is None else ap + 0.01 * k for k, name in enumerate(names)}
        (folder / "metrics.json").write_text(json.dumps(metrics | {"per_class": {}, "minutes": minutes}))
    return folder


def reported(sweep):
    console = Console(file=io.StringIO(), width=150)
    report_sweep(sweep, console)
    return console.file.getvalue()


def lines(text):
    """The lines of a table on the terminal, without its frame; the first is the head."""
    rows = [line.replace("┃", "│").split("│") for line in text.splitlines() if "│" in line or "┃" in line]
    return [[cell.strip() for cell in row[1:-1]] for row in rows]


def rows_of(path):
    return list(csv.DictReader(path.open()))


def test_an_ablation_has_the_columns_of_the_paper_in_the_order_of_its_cells(tmp_path):
    make_cell(tmp_path, 10, "ism=off", "cmm=off", choices=ON | {"ism": "off", "cmm": "off"}, ap=0.3, minutes=7.25)
    make_cell(tmp_path, 2, "ism=off", "cmm=two_stage", choices=ON | {"ism": "off", "cmm": "two_stage"})
    make_cell(tmp_path, 1, "ism=on", "cmm=on", ap=0.5)
    head, *rows = lines(reported(tmp_path))
    assert head == ["CMM", "ISM", "RSM", "AP", "AP50", "AP75", "APs", "APm", "APl", "minutes"]
    assert [row[:4] for row in rows] == [
        ["✓", "✓", "✓", "50.0"],
        ["two_stage", "–", "✓", "40.0"],
        ["–", "–", "✓", "30.0"],
    ]
    assert rows[2][4:] == ["31.0", "32.0", "33.0", "34.0", "35.0", "7.2"]


def test_experiments_that_choose_the_modules_are_an_ablation_too(tmp_path):
    make_cell(tmp_path, 0, "experiment=ablation_none", choices=dict.fromkeys(ON, "off"))
    make_cell(tmp_path, 1, "experiment=cpm_r50_2x")
    head, *rows = lines(reported(tmp_path))
    assert head[:5] == ["experiment", "CMM", "ISM", "RSM", "AP"]
    assert rows[0][:4] == ["ablation_none", "–", "–", "–"]


def test_other_sweeps_have_a_column_per_override_that_differs_and_can_change_the_result(tmp_path):
    box = {"cmm": "none", "ism": "off", "rsm": "off"}
    make_cell(tmp_path, 0, "data=shapes", "head=cpm", "schedule.base_lr=0.1", "name=a", "logger.csv.name=a")
    make_cell(tmp_path, 1, "data=shapes", "head=faster", "+schedule.base_lr=0.2", "name=b", choices=box)
    make_cell(tmp_path, 2, "data=shapes", "head=faster", choices=box)
    head, *rows = lines(reported(tmp_path))
    assert head[:3] == ["head", "schedule.base_lr", "AP"]
    assert [row[:2] for row in rows] == [["cpm", "0.1"], ["faster", "0.2"], ["faster", "–"]]


def test_several_seeds_become_mean_and_standard_deviation(tmp_path):
    for number, (head, seed, ap) in enumerate(
        [("cpm", 0, 0.4), ("cpm", 1, 0.42), ("cpm", 2, 0.44), ("faster", 0, 0.3)]
    ):
        make_cell(tmp_path, number, f"head={head}", f"seed={seed}", seed=seed, ap=ap, minutes=seed + 1)
    text = reported(tmp_path)
    head, *rows = lines(text)
    assert "mean ± standard deviation" in text
    assert head[:3] == ["head", "seeds", "AP"]
    assert rows[0][:4] == ["cpm", "0, 1, 2", "42.0 ± 2.0", "43.0 ± 2.0"]
    assert rows[0][-1] == "2.0"
    assert rows[1][:3] == ["faster", "0", "30.0"]
    first, second = rows_of(tmp_path / "sweep.csv")
    assert (first["seeds"], first["AP"], first["AP_std"], first["minutes_std"]) == ("0 1 2", "42", "2", "1")
    assert (second["AP"], second["AP_std"]) == ("30", "")
    assert [row["AP"] for row in rows_of(tmp_path / "cells.csv")] == ["40", "42", "44", "30"]


def test_a_table_in_a_file_is_as_wide_as_its_content(tmp_path):
    for seed in range(2):
        make_cell(tmp_path, seed, f"seed={seed}", "schedule.milestones=[1000,2000,3000,4000]", seed=seed)
        make_cell(tmp_path, 2 + seed, f"seed={seed}", "schedule.milestones=[4000]", seed=seed)
    console = Console(file=io.StringIO(), width=60)
    report_sweep(tmp_path, console)
    assert lines(console.file.getvalue())[1][0] == "[1000,2000,3000,4000]"


def test_seeds_alone_are_one_row(tmp_path):
    for seed in range(2):
        make_cell(tmp_path, seed, f"seed={seed}", seed=seed)
    assert [row[:3] for row in lines(reported(tmp_path))] == [["cell", "seeds", "AP"], ["all", "0, 1", "40.0 ± 0.0"]]


def test_cells_without_a_result_have_their_own_row_and_their_error_below_the_table(tmp_path):
    make_cell(tmp_path, 0, "head=cpm", "seed=0", seed=0)
    make_cell(tmp_path, 1, "head=cpm", "seed=1", seed=1, status="failed", error="data.root=[x] has | no images")
    make_cell(tmp_path, 2, "head=faster", "seed=0", seed=0, status="running")
    text = reported(tmp_path)
    assert [row[:3] for row in lines(text)[1:]] == [
        ["cpm", "0", "40.0"],
        ["cpm", "1", "failed"],
        ["faster", "0", "unfinished"],
    ]
    assert "1_cell: failed: data.root=[x] has | no images" in text
    assert "2_cell: unfinished: " in text
    markdown = (tmp_path / "sweep.md").read_text()
    assert "| cpm | 1 | failed |" in markdown
    assert "- 1_cell: failed: data.root=[x] has | no images" in markdown
    statuses = [(row["status"], row["error"]) for row in rows_of(tmp_path / "sweep.csv")]
    assert statuses == [("finished", ""), ("failed", "data.root=[x] has | no images"), ("running", "")]


def test_an_undefined_metric_is_a_dash_also_in_a_mean(tmp_path):
    make_cell(tmp_path, 0, "seed=0", seed=0)
    make_cell(tmp_path, 1, "seed=1", seed=1, ap=None)
    assert lines(reported(tmp_path))[1][2] == "–"
    assert rows_of(tmp_path / "sweep.csv")[0]["AP"] == ""


def test_markdown_is_a_table_with_aligned_numbers(tmp_path):
    make_cell(tmp_path, 0, "head=cpm")
    make_cell(tmp_path, 1, "head=a|b")
    reported(tmp_path)
    text = (tmp_path / "sweep.md").read_text().splitlines()
    assert text[2:4] == [
        "| head | AP | AP50 | AP75 | APs | APm | APl | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    assert text[5].startswith(r"| a\|b | 40.0 |")


def test_the_chart_grows_with_the_number_of_rows(tmp_path):
    for number in range(12):
        make_cell(tmp_path / "many", number, f"schedule.base_lr={number}", ap=None if number == 3 else 0.1)
    make_cell(tmp_path / "few", 0, "seed=0", status="failed", error="x")
    heights = []
    for name in ("many", "few"):
        reported(tmp_path / name)
        with Image.open(tmp_path / name / "sweep.png") as image:
            assert image.width > 600
            heights.append(image.height)
    assert heights[0] > 2 * heights[1]


def test_the_chart_names_its_rows_after_the_modules(tmp_path):
    from cpm_rcnn.reporting.sweep import sweep_figure

    make_cell(tmp_path, 0, "rsm=on", "schedule.base_lr=1", choices={"cmm": "two_stage", "ism": "off", "rsm": "on"})
    make_cell(tmp_path, 1, "rsm=off", "schedule.base_lr=2", choices={"cmm": "none", "ism": "off", "rsm": "off"})
    (axes,) = sweep_figure(read_sweep(tmp_path)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "base_lr=1 CMM two_stage + RSM",
        "base_lr=2 no module",
    ]


def test_a_finished_cell_whose_metrics_cannot_be_read_is_unfinished(tmp_path):
    folder = make_cell(tmp_path, 0)
    assert read_cell(folder).finished
    for content in ("{", "[1]", None):
        (folder / "metrics.json").unlink() if content is None else (folder / "metrics.json").write_text(content)
        assert read_cell(folder).status == "running"


def test_a_damaged_record_is_refused_by_name_and_other_folders_are_no_cells(tmp_path):
    (tmp_path / "0_other").mkdir()
    assert read_cell(tmp_path / "0_other") is None
    assert read_sweep(tmp_path).cells == ()
    (tmp_path / "0_other" / "cell.json").write_text('{"number": 1}')
    with pytest.raises(UserError, match=r"0_other.cell\.json: not a record of a cell"):
        read_sweep(tmp_path)


def test_a_record_is_read_as_it_was_written(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    cell = Cell(tmp_path / "a/b", 3, ("seed=1", "cmm=off"), ON, 1, "failed", "why")
    write_record(cell)
    assert read_sweep(tmp_path).cells == (cell,)
