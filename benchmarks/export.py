"""Time per image of a detector in torch, compiled, and as exported files, in one run.

    pip install onnx onnxscript onnxruntime
    python benchmarks/export.py CHECKPOINT [--rounds 20] [--threads 1]

All run the same drawn image in turns, by itself and at the size of the test. The times are medians; a ratio is the
median of the ratios to torch within a round, which other programs on the machine disturb less than the times.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from cpm_rcnn import load
from cpm_rcnn.inference.export import export
from cpm_rcnn.inference.export.onnx_file import OnnxRunner
from cpm_rcnn.inference.export.parity import drawn_images, run_batch
from cpm_rcnn.inference.export.pt2_file import Pt2Runner


def main() -> None:
    """Export, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    detector = load(arguments.checkpoint).optimize()
    image = detector.resize(next(iter(drawn_images(detector).values())))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"detector.{name}" for name in ("pt2", "onnx")}
        for name, file in files.items():
            export(detector, file, name)
        pt2, onnx = Pt2Runner(files["pt2"]), OnnxRunner(files["onnx"], arguments.threads)
        sizes = {name: file.stat().st_size / 1e6 for name, file in files.items()}
    compiled = load(arguments.checkpoint).optimize(compile=True)
    ways: dict[str, Callable[[], object]] = {
        "torch": lambda: detector.model([image]),
        "torch, compiled": lambda: compiled.model([image]),
        ".pt2 file": lambda: run_batch(pt2, [image]),
        "onnxruntime": lambda: run_batch(onnx, [image]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(arguments.rounds + 3):
            for name, detect in ways.items():
                begun = time.perf_counter()
                detect()
                times[name].append(1e3 * (time.perf_counter() - begun))
        found = len(detector.model([image])[0]["scores"])
    height, width = image.shape[-2:]
    table = Table(title=f"{height} x {width}, {found} detections, {arguments.threads} thread(s)")
    for column in ("", "ms", "ratio to torch"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values[3:], times["torch"][3:])]
        table.add_row(name, f"{statistics.median(values[3:]):.1f}", f"{statistics.median(ratios):.2f}")
    console = Console()
    console.print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    console.print(table)
    console.print(", ".join(f"{name}: {size:.1f} MB" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
