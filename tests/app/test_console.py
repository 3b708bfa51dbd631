"""The program ``cpm-rcnn``, ``--version``, and what a command prints about a wrong argument."""

import importlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from cpm_rcnn import console

PYTHON = [sys.executable, "-m", "cpm_rcnn.eval"]
PROGRAM = Path(sys.executable).with_name("cpm-rcnn")


def run(*arguments: str, folder=None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)


def test_every_command_is_a_module_with_a_line_in_the_usage():
    usage = console.usage()
    for name, summary in console.COMMANDS.items():
        assert callable(importlib.import_module(f"cpm_rcnn.{name}").main)
        assert f"  {name:10} {summary}\n" in usage


@pytest.mark.parametrize("start", [[str(PROGRAM), "eval"], [sys.executable, "-m", "cpm_rcnn", "eval"]])
def test_it_runs_a_command_as_python_does(start, tmp_path):
    answers = [run(*each, "ckpt=nosuch.ckpt", folder=tmp_path) for each in (start, PYTHON)]
    assert answers[0].returncode == answers[1].returncode == 2
    assert answers[0].stderr == answers[1].stderr == "error: ckpt=nosuch.ckpt: no such file\n"


def test_further_processes_start_the_module_of_the_command(monkeypatch):
    """Lightning repeats ``python -m`` with the name of the main module."""
    seen = {}

    def record(*arguments, **options):
        seen.update(name=arguments[0], arguments=sys.argv[1:], **options)

    monkeypatch.setattr(console.runpy, "run_module", record)
    monkeypatch.setattr(sys, "argv", ["cpm-rcnn", "train", "seed=1"])
    console.main()
    assert seen == {"name": "cpm_rcnn.train", "arguments": ["seed=1"], "run_name": "__main__", "alter_sys": True}


@pytest.mark.parametrize("arguments", [[str(PROGRAM), "--version"], [*PYTHON, "--version"]])
def test_the_version(arguments):
    assert run(*arguments).stdout == f"cpm-rcnn {version('cpm-rcnn')}\n"


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        console.main(["trian"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: trian: no such command; cpm-rcnn has train, eval")


@pytest.mark.parametrize(
    ("words", "expected", "absent"),
    [
        (["ev"], "eval", "train"),
        (["train", "backbone=x"], "backbone=x101_dcn", "backbone=r50"),
        (["train", "schedule.base"], "schedule.base_lr=", "schedule.gamma="),
        (["predict", "ckpt=runs/b"], "ckpt=runs/best.ckpt", "ckpt=runs/last.ckpt"),
        (["eval", "ckpt=ru"], "ckpt=runs/", "ckpt=runs"),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_commands_groups_options_and_files(shell, words, expected, absent, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "runs").mkdir()
    for name in ("best.ckpt", "last.ckpt"):
        (tmp_path / "runs" / name).touch()
    line = " ".join(["cpm-rcnn", *words])
    # Completion functions of bash run in zsh with arrays that count from 0.
    script = f"""ZDOTDIR=$PWD
    eval "$(cpm-rcnn completion)"
    {"setopt ksh_arrays" if shell == "zsh" else ""}
    COMP_LINE='{line}' COMP_WORDS=({line}) COMP_CWORD={len(words)}
    _cpm_rcnn
    printf '%s\\n' "${{COMPREPLY[@]}}" """
    found = run(shell, *(["-f"] if shell == "zsh" else []), "-c", script, folder=tmp_path).stdout.split()
    assert expected in found
    # zsh itself leaves out what does not start with the word.
    assert absent not in [each for each in found if shell == "bash" or each.startswith(words[-1])]


def test_a_defect_keeps_its_traceback_and_the_cause(command, monkeypatch):
    from cpm_rcnn.commands import train

    def fail(config):
        try:
            raise KeyError("first")
        except KeyError as error:
            raise RuntimeError("defect") from error

    monkeypatch.setattr(train, "train_model", fail)
    with pytest.raises(RuntimeError, match="defect") as caught:
        command("train", "experiment=quickstart", "name=defect")
    assert isinstance(caught.value.__cause__, KeyError)
