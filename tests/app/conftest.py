import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from small_run import SMALL

from cpm_rcnn.check import check
from cpm_rcnn.cli import main
from cpm_rcnn.compare import compare
from cpm_rcnn.convert import convert
from cpm_rcnn.eval import evaluate
from cpm_rcnn.export import export
from cpm_rcnn.predict import predict
from cpm_rcnn.train import train

TASKS = {
    "check": check,
    "compare": compare,
    "convert": convert,
    "eval": evaluate,
    "export": export,
    "predict": predict,
    "train": train,
}


@dataclass
class Answer:
    """The exit status of a command and what it printed."""

    status: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The run folder, which every command prints last."""
        return Path(self.out.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """The folder that the commands of a test session are run from."""
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture
def command(workplace, monkeypatch, capfd):
    """Call a command in this process as if from a shell in ``workplace``: ``command("eval", "ckpt=...")``."""

    def call(name: str, *arguments: str) -> Answer:
        monkeypatch.chdir(workplace)
        monkeypatch.setattr(sys, "argv", [f"cpm_rcnn.{name}", *arguments])
        GlobalHydra.instance().clear()
        # Hydra's handlers write to the streams of this test.
        monkeypatch.setattr(logging.getLogger(), "handlers", list(logging.getLogger().handlers))
        capfd.readouterr()
        status = 0
        try:
            main.run(TASKS[name], name)
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capfd.readouterr()
        return Answer(status, printed.out, printed.err)

    return call


_trained: dict[str, Answer] = {}


@pytest.fixture
def trained(command):
    """The answer of one small training run, which all tests share."""
    if not _trained:
        answer = command("train", *SMALL)
        assert answer.status == 0, answer.err
        _trained["answer"] = answer
    return _trained["answer"]


@pytest.fixture
def checkpoint(trained):
    """A checkpoint of that run."""
    return trained.folder / "checkpoints" / "best.ckpt"
