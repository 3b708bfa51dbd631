"""The scripts of the documentation."""

import importlib
import subprocess
import sys
from pathlib import Path

import torch

import cpm_rcnn
from cpm_rcnn.data.shapes import write_shapes

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_the_training_in_python_ends_with_detections_whose_heatmaps_can_be_drawn(tmp_path, monkeypatch):
    write_shapes(tmp_path / "data", 6, 2)
    arguments = [str(tmp_path / "data"), str(tmp_path / "run"), "5"]
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "train_in_python.py", *arguments], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert "'loss_grid2':" in ran.stdout
    assert (tmp_path / "run" / "best.ckpt").is_file()
    assert ran.stdout.splitlines()[-1].startswith(str(tmp_path / "run" / "best.ckpt"))
    monkeypatch.syspath_prepend(EXAMPLES)
    draw_heatmaps = importlib.import_module("draw_heatmaps")
    detector = cpm_rcnn.load(tmp_path / "run" / "best.ckpt", score_threshold=0.0)
    image, rows = draw_heatmaps.seen_by_stages(detector, torch.full((3, 100, 120), 90, dtype=torch.uint8))
    assert [heatmaps.shape for _, _, heatmaps in rows] == [(9, 28, 28)] * 3
    # Each stage refines the box of the one before.
    assert rows[1][0].equal(rows[0][1])
    assert rows[2][0].equal(rows[1][1])
    draw_heatmaps.draw(image, rows, [1.0, 0.5, 0.25], str(tmp_path / "heatmaps.png"))
    assert (tmp_path / "heatmaps.png").stat().st_size > 5000
