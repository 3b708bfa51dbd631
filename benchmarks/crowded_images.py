"""Memory and time of one training step by the number of objects per image.

    python benchmarks/crowded_images.py

Each row is a process of its own, on the CPU: two images of 800 x 1344 pixels, random weights, forward and backward.
Stem and C2 are frozen, as in every training from ImageNet weights. The time is CPU time.
The memory is the peak of the resident set minus its size before the step, when model and images are loaded. A row that
exceeds ``--limit`` is stopped, and so are all later ones.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cpm_rcnn.models.build import build_detector

_PAGE = os.sysconf("SC_PAGE_SIZE")
_STOPPED = 3
_GIB = 1 << 30


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


class PeakMemory:
    """Measures the peak of the resident set in a thread, and ends the process if it exceeds ``limit`` bytes."""

    def __init__(self, limit: float) -> None:
        self.start = self.peak = resident()
        self.limit = limit
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, resident())
            if self.peak - self.start > self.limit:
                os._exit(_STOPPED)
            time.sleep(0.002)


def measure(objects: int, options: argparse.Namespace) -> None:
    """One step; prints GiB, seconds and the loss."""
    torch.manual_seed(0)
    model = build_detector(
        {"name": options.backbone, "frozen_stages": options.frozen_stages},
        point_channels=options.point_channels,
        grid_convs=options.grid_convs,
    )
    height, width = 800, 1344
    images = list(torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8))
    targets = []
    for _ in images:
        side = 8 + 120 * torch.rand(objects, 2)
        corner = torch.rand(objects, 2) * (torch.tensor([width, height]) - side)
        boxes = torch.cat([corner, corner + side], dim=1)
        targets.append({"boxes": boxes, "labels": torch.randint(1, 81, (objects,))})
    memory = PeakMemory(options.limit * _GIB)
    start = time.process_time()
    loss = torch.stack(list(model(images, targets).values())).sum()
    loss.backward()
    seconds = time.process_time() - start
    print(f"{(memory.peak - memory.start) / _GIB:.2f} {seconds:.1f} {loss.item():.3g}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 50, 200, 1000, 3000])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--frozen-stages", type=int, default=2)
    parser.add_argument("--point-channels", type=int, default=64)
    parser.add_argument("--grid-convs", type=int, default=8)
    parser.add_argument("--limit", type=float, default=14.0, help="GiB above the start")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measure(options.one, options)
        return
    table = Table(title=f"{options.backbone}, batch 2, 800 x 1344, {torch.get_num_threads()} threads")
    for name in ("objects per image", "peak GiB above the start", "CPU seconds", "loss"):
        table.add_column(name, justify="right")
    for objects in options.objects:
        command = [sys.executable, *sys.argv, "--one", str(objects)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            table.add_row(str(objects), f"over {options.limit:g}" if result.returncode == _STOPPED else "failed")
            break
        table.add_row(str(objects), *result.stdout.split())
        print(objects, result.stdout.strip(), flush=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
