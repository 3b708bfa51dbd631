"""The scripts of the documentation."""

import subprocess
import sys
from pathlib import Path

from cpm_rcnn.data.shapes import write_shapes

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_the_training_in_python_ends_with_detections(tmp_path):
    write_shapes(tmp_path / "data", 6, 2)
    arguments = [str(tmp_path / "data"), str(tmp_path / "run"), "5"]
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "train_in_python.py", *arguments], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert "5 {'objectness':" in ran.stdout
    assert (tmp_path / "run" / "best.ckpt").is_file()
    assert ran.stdout.splitlines()[-1].startswith(str(tmp_path / "run" / "best.ckpt"))
