"""What a command has printed and written, for the tests of all commands."""

import csv
import json
from pathlib import Path

import torch


def refused(answer) -> str:
    """The one line with which a command refused its input."""
    assert answer.status == 2, (answer.status, answer.out, answer.err)
    lines = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in answer.err
    assert "Error executing job" not in answer.err
    return lines[0]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def rows_of(folder: Path, name: str = "metrics.csv") -> list[dict]:
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def last_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    """Whether two mappings hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_run(a: dict, b: dict) -> bool:
    """Whether weights, optimizer and schedule of two checkpoints are the same, bit for bit."""
    assert a["global_step"] == b["global_step"]
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (a, b)]
    assert states[0].keys() == states[1].keys()
    optimizers = all(same(states[0][i], states[1][i]) for i in states[0])
    return same(a["state_dict"], b["state_dict"]) and optimizers and a["lr_schedulers"] == b["lr_schedulers"]
