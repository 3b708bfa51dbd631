"""Sweeps: the folders and processes of cells, and multiruns with a failing cell that are repeated."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from omegaconf import OmegaConf
from runs import rows_of
from small_run import SMALL

from cpm_rcnn.cli import sweep
from cpm_rcnn.cli.sweep import SweepReport, cell_folder, error_line, run_cell, run_process
from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting.sweep import Cell, read_cell, write_record

CHOICES = {"cmm": "on", "ism": "on", "rsm": "on"}


def make_cell(folder, *overrides, status="finished", ap=0.5):
    folder.mkdir(parents=True)
    write_record(Cell(folder, int(folder.name.partition("_")[0]), overrides, CHOICES, 0, status))
    (folder / "metrics.json").write_text(json.dumps({"AP": ap}))


# --- folders ---


def test_a_cell_keeps_its_folder_if_the_order_or_number_of_cells_changes(tmp_path):
    make_cell(tmp_path / "0_cpm", "seed=0", "schedule.base_lr=0.1")
    make_cell(tmp_path / "1_cpm", "seed=0", "schedule.base_lr=0.2", status="failed")
    (tmp_path / "notes").mkdir()
    assert cell_folder(tmp_path, "2_cpm", ["schedule.base_lr=0.2", "seed=0"]) == "1_cpm"
    assert (
        cell_folder(tmp_path, "1_cpm", ["seed=0", "schedule.base_lr=0.1", "data.num_workers=3", "sweep=x"]) == "0_cpm"
    )
    assert cell_folder(tmp_path, "2_cpm", ["seed=1", "schedule.base_lr=0.1"]) == "2_cpm"
    assert cell_folder(tmp_path / "new", "0_cpm", ["seed=1"]) == "0_cpm"


def test_a_new_cell_whose_folder_another_cell_has_gets_the_next_free_number(tmp_path):
    make_cell(tmp_path / "0_cpm", "seed=0")
    make_cell(tmp_path / "7_faster", "seed=0", "head=faster")
    assert cell_folder(tmp_path, "0_cpm", ["seed=1"]) == "8_cpm"
    assert cell_folder(tmp_path, "0_cpm", ["seed=2"]) == "9_cpm", "the first is taken, although it has no record yet"


# --- processes ---


def python(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_the_output_of_a_process_is_shown_and_its_last_error_is_the_reason(capfd):
    code = "import sys; print('out'); print('error: a\\nerror: data.root=x: no such folder\\nwarning', file=sys.stderr)"
    status, tail = run_process(python(f"{code}; sys.exit(2)"))
    shown = capfd.readouterr()
    assert (status, shown.out) == (2, "out\n")
    assert shown.err.endswith("warning\n")
    assert error_line(status, tail) == "data.root=x: no such folder"


@pytest.mark.parametrize(
    ("status", "tail", "line"),
    [
        (
            1,
            "Traceback (most recent call last):\n  File\n\x1b[31mRuntimeError: no\x1b[0m memory\n",
            "RuntimeError: no memory",
        ),
        (1, "", "exit status 1"),
        (-9, "warning", "ended by SIGKILL"),
        (143, "warning", "ended by SIGTERM"),
        (200, "", "exit status 200"),
    ],
)
def test_the_reason_of_other_ends_is_one_line(status, tail, line):
    assert error_line(status, tail) == line


WAIT = """
import pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.7)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
pathlib.Path(sys.argv[1]).write_text("ready")
time.sleep(30)
"""


def _signal_when_ready(path, number, group):
    """Send a signal to this process, and to its child if ``group``, as a terminal does."""

    def send():
        while not (path.exists() and path.read_text() == "ready"):
            time.sleep(0.05)
        if group:
            children = subprocess.run(
                ["pgrep", "-P", str(os.getpid()), "-f", str(path)], capture_output=True, text=True
            )
            os.kill(int(children.stdout.split()[0]), number)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_reaches_the_process_which_has_the_time_to_save(tmp_path, number, group):
    path = tmp_path / "state"
    # A shell starts background jobs with SIGINT ignored, and so would be the process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    _signal_when_ready(path, number, group)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
            run_process(python(WAIT, path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert path.read_text() == "saved"
    assert stop.type is (KeyboardInterrupt if group else SystemExit)
    if not group:
        assert stop.value.code == 128 + number


# --- cells ---


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """Call ``run_cell`` in a folder with a process that does nothing but exit; returns the result and its commands."""

    def call(*overrides, status=0, tail="", ap=0.25, run=None, **config):
        folder = tmp_path / "0_cpm"
        folder.mkdir(exist_ok=True)
        hydra = {
            "runtime": {"output_dir": str(folder), "choices": {"cmm": "on", "ism": "on", "rsm": "off"}},
            "overrides": {"task": list(overrides)},
            "job": {"num": 0},
        }
        commands = []

        def pretend(command):
            commands.append(command)
            assert read_cell(folder).status == "running"
            if status == 0 and ap != "missing":
                (folder / "metrics.json").write_text(json.dumps({"AP": ap}))
            return status, tail

        monkeypatch.setattr(sweep, "run_process", run or pretend)
        monkeypatch.setattr(sweep.HydraConfig, "get", lambda: OmegaConf.create(hydra))
        return run_cell(OmegaConf.create({"seed": 3, "overwrite": False, **config})), commands

    call.folder = tmp_path / "0_cpm"
    return call


def test_a_cell_returns_its_ap_and_is_recorded(cell):
    ap, (command,) = cell("seed=3", "rsm=off")
    assert ap == 0.25
    assert command[1:5] == ["-m", "cpm_rcnn.train", "seed=3", "rsm=off"]
    assert command[5] == f"hydra.run.dir='{cell.folder}'"
    assert "resume=auto" not in command
    recorded = read_cell(cell.folder)
    assert (recorded.status, recorded.seed, recorded.overrides) == ("finished", 3, ("seed=3", "rsm=off"))
    assert recorded.choices == {"cmm": "on", "ism": "on", "rsm": "off"}


def test_a_finished_cell_is_skipped_and_returns_its_ap(cell, capsys):
    cell("seed=3")
    assert cell("seed=3", "data.num_workers=4", ap=0.9) == (0.25, [])
    assert "has finished already, skipped" in capsys.readouterr().out


def test_overwrite_on_the_command_line_trains_a_finished_cell_again(cell):
    cell("seed=3")
    assert cell("seed=3", overwrite=True) == (0.25, []), "overwrite=true of an experiment"
    ap, (command,) = cell("seed=3", "overwrite=true", overwrite=True, ap=0.9)
    assert ap == 0.9
    assert "resume=auto" not in command


@pytest.mark.parametrize(("status", "recorded"), [(1, "failed"), (-9, "failed"), (143, "stopped"), (130, "stopped")])
def test_a_cell_that_fails_does_not_raise_and_is_resumed_by_the_next_launch(cell, status, recorded):
    ap, _ = cell("seed=3", status=status, tail="error: no memory")
    assert ap is None
    assert read_cell(cell.folder).status == recorded
    ap, (command,) = cell("seed=3")
    assert ap == 0.25
    assert command[-1] == "resume=auto"
    assert read_cell(cell.folder).error is None


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_signal_to_the_sweep_is_recorded_and_ends_it(cell, stop):
    cell("seed=3", status=1)

    def stopped(command):
        raise stop

    with pytest.raises(type(stop)):
        cell("seed=3", run=stopped)
    assert read_cell(cell.folder).status == "stopped"


def test_a_resume_option_of_the_user_is_kept(cell):
    cell("seed=3", "resume=x.ckpt", status=1)
    _, (command,) = cell("seed=3", "resume=x.ckpt")
    assert [argument for argument in command if argument.startswith("resume")] == ["resume=x.ckpt"]


def test_an_undefined_ap_is_none_and_missing_metrics_are_a_failure(cell):
    assert cell("seed=1", ap=None)[0] is None
    assert read_cell(cell.folder).finished
    assert cell("seed=1", "overwrite=true", overwrite=True, ap="missing")[0] is None


def test_a_folder_of_another_cell_is_not_used(cell):
    cell("seed=3")
    with pytest.raises(UserError, match=r"contains another cell, with seed=3"):
        cell("seed=4")


# --- the report at the end ---


def _end(folder):
    SweepReport().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))


def test_the_report_ends_with_the_folder_and_status_1_if_a_cell_has_no_result(tmp_path, capsys):
    make_cell(tmp_path / "0_cpm", "seed=0")
    _end(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path)
    make_cell(tmp_path / "1_cpm", "seed=1", status="failed")
    with pytest.raises(SystemExit) as stop:
        _end(tmp_path)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(tmp_path)
    assert printed.err == "error: 1 of 2 cells have no result, see above\n"


def test_a_report_that_cannot_be_made_is_an_error_and_not_a_warning_of_hydra(tmp_path, capsys, monkeypatch):
    make_cell(tmp_path / "0_cpm", "seed=0")
    (tmp_path / "0_cpm/cell.json").write_text("{")
    with pytest.raises(SystemExit):
        _end(tmp_path)
    assert "not a record" in capsys.readouterr().err
    monkeypatch.setattr(sweep, "report_sweep", lambda folder: 1 / 0)
    with pytest.raises(SystemExit):
        _end(tmp_path)
    assert "ZeroDivisionError" in capsys.readouterr().err


# --- real multiruns ---


def test_a_failing_cell_does_not_end_the_sweep_and_the_same_sweep_again_trains_only_what_is_missing(command, workplace):
    small = [override for override in SMALL if not override.startswith("overwrite")]
    arguments = [*("-m", *small, "schedule.max_steps=1", "sheet_images=0", "sweep=lr"), "init=null,own.ckpt", "seed=4"]
    first = command("train", *arguments)
    folder = workplace / "outputs/lr"
    assert first.status == 1, first.err
    assert first.folder == folder
    assert first.err.splitlines()[-1] == "error: 1 of 2 cells have no result, see above"
    rows = rows_of(folder, "sweep.csv")
    assert [(row["init"], row["seeds"], row["status"]) for row in rows] == [
        ("null", "4", "finished"),
        ("own.ckpt", "4", "failed"),
    ]
    assert "own.ckpt" in rows[1]["error"]
    assert float(rows[0]["minutes"]) > 0
    assert {path.name for path in folder.iterdir()} >= {"sweep.csv", "sweep.md", "sweep.png", "cells.csv"}
    kept = folder / "0_cpm_cmm-on_ism-on_rsm-on/checkpoints/last.ckpt"
    config = OmegaConf.load(kept.parents[1] / "config.yaml")
    assert (config.sweep, config.name) == ("lr", kept.parents[1].name)
    before = kept.stat().st_mtime_ns

    # In other processes, if the launcher is installed.
    joblib = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(
        "hydra_plugins.hydra_joblib_launcher"
    )
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if joblib else []
    (workplace / "own.ckpt").write_bytes(kept.read_bytes())
    second = command("train", *arguments, *launcher)
    assert second.status == 0, second.err
    assert kept.stat().st_mtime_ns == before
    assert [row["status"] for row in rows_of(folder, "sweep.csv")] == ["finished", "finished"]
    assert sorted(path.name for path in folder.glob("*_cpm_*")) == [f"{i}_cpm_cmm-on_ism-on_rsm-on" for i in range(2)]
