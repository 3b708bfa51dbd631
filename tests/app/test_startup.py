"""``--help`` and errors in a config do not import torch, Lightning or matplotlib, which takes seconds."""

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "pytorch_lightning", "lightning_fabric", "torchmetrics", "matplotlib")
# Stored as sitecustomize.py, which Python imports first.
REPORT = """
import atexit, sys
atexit.register(lambda: print("imported:", *({names} & set(sys.modules)), file=sys.stderr))
"""
REQUIRED = {
    "train": [],
    "eval": ["ckpt=x.ckpt"],
    "predict": ["ckpt=x.ckpt", "source=x.jpg"],
    "convert": ["src=x.pth", "dst=x.ckpt"],
    "compare": ["a", "b"],
    "export": ["ckpt=x.ckpt", "dst=x.onnx"],
    "check": [],
}


@pytest.fixture
def ended(tmp_path):
    """Run a command in a process of its own; it must not import anything of ``HEAVY``."""
    (tmp_path / "sitecustomize.py").write_text(REPORT.format(names=set(HEAVY)))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess:
        ran = subprocess.run(
            [sys.executable, "-m", f"cpm_rcnn.{command}", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        *_, imported = ran.stderr.splitlines()
        assert imported == "imported:", f"{command} {' '.join(arguments)} has {imported}"
        return ran

    return run


@pytest.mark.parametrize("command", REQUIRED)
def test_help_imports_nothing_that_takes_seconds(ended, command):
    shown = ended(command, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: python -m cpm_rcnn.{command}")


@pytest.mark.parametrize("command", REQUIRED)
def test_an_unknown_option_is_refused_without_imports_that_take_seconds(ended, command):
    refused = ended(command, *REQUIRED[command], "nosuch=1")
    assert refused.returncode == 2
    assert "error: nosuch: unknown option" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "head=nosuch"], "head=nosuch: there is no conf/head/nosuch.yaml"),
        (["train", "data=custom"], "data.root=null: give the folder of the data"),
        (["train", "data=custom", "data.root=."], "data.root=.: no data set in a known format"),
        (["train", "seed"], "seed: not an override that Hydra can read"),
        (["train", "seed=x"], "seed=x: must be an integer"),
        (["train", "schedule.max_steps=x"], "schedule.max_steps=x: must be an integer"),
        (["train", "data.num_workers=x"], "data.num_workers=x: must be an integer"),
        (["train", "trainer.precision=x"], "trainer.precision=x: must be one of"),
        (["eval", "ckpt=x", "trainer.devices=x"], "trainer.devices=x: must be a number of devices"),
        (["eval"], "ckpt: must be given"),
        (["eval", "ckpt=x", "detector.nosuch=1"], "detector.nosuch: unknown option"),
        (["eval", "ckpt=nosuch.ckpt"], "ckpt=nosuch.ckpt: no such file"),
        (["predict", "ckpt=x", "source=x", "min_score=2"], "min_score=2: must be a number"),
    ],
)
def test_common_errors_are_found_without_imports_that_take_seconds(ended, arguments, message):
    refused = ended(*arguments)
    assert refused.returncode == 2
    assert f"error: {message}" in refused.stderr


def test_composing_a_config_imports_nothing_that_takes_seconds(ended):
    shown = ended("train", "--cfg", "job", "experiment=quickstart")
    assert shown.returncode == 0
    assert "name: tiny" in shown.stdout
