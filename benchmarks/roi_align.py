"""RoIAlign on a CPU: this project's embedding bag compared with torchvision's operator in one run.

    python benchmarks/roi_align.py

For the two poolings of the detector (7x7 for classifiers, 14x14 for grid stages) it prints the fastest of several
forward and backward passes of each, the ratios, and the largest difference of the outputs.
"""

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.models.pooling import CellPyramid, PyramidRoIAlign, pyramid_levels
from cpm_rcnn.models.structures import Rois

STRIDES = (4, 8, 16, 32)


def best_times(pool: Callable[[], Tensor], features: list[Tensor], rounds: int) -> tuple[float, float]:
    """Milliseconds of the fastest forward and of the fastest backward pass."""
    forward, backward = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        pooled = pool()
        forward.append(time.perf_counter() - begun)
        grad = torch.ones_like(pooled)
        begun = time.perf_counter()
        torch.autograd.grad(pooled, features, grad)
        backward.append(time.perf_counter() - begun)
    return 1e3 * min(forward), 1e3 * min(backward)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="image height and width in pixels")
    options = parser.parse_args()
    torch.manual_seed(0)
    height, width = options.size
    maps = [torch.randn(2, options.channels, height // s, width // s) for s in STRIDES]
    table = Table(title=f"RoIAlign, ms, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in (
        "RoIs",
        "bins",
        "torchvision fwd",
        "bwd",
        "embedding bag fwd",
        "bwd",
        "ratio fwd",
        "bwd",
        "max diff",
    ):
        table.add_column(column, justify="right")
    for count, bins in ((1024, 7), (192, 14)):
        pool = PyramidRoIAlign(bins, STRIDES, CONTINUOUS)
        corner = torch.rand(count, 2) * torch.tensor([0.8 * width, 0.8 * height])
        boxes = torch.cat([corner, corner + 10 + torch.rand(count, 2) ** 2 * 0.8 * height], dim=1)
        rois = Rois.of(boxes, torch.randint(0, 2, (count,)))
        levels = pyramid_levels(boxes, len(STRIDES), CONTINUOUS)
        # Each in its fastest memory format.
        rows = [m.clone().requires_grad_() for m in maps]
        bags = [m.contiguous(memory_format=torch.channels_last).clone().requires_grad_() for m in maps]
        theirs = best_times(lambda: pool._pool_levels(rows, rois, levels), rows, options.rounds)  # noqa: B023
        ours = best_times(lambda: pool._pool_bags(CellPyramid(bags), rois, levels), bags, options.rounds)  # noqa: B023
        difference = (
            (pool._pool_levels(rows, rois, levels) - pool._pool_bags(CellPyramid(bags), rois, levels))
            .abs()
            .max()
            .item()
        )
        times = [*theirs, *ours, theirs[0] / ours[0], theirs[1] / ours[1]]
        table.add_row(str(count), f"{bins}x{bins}", *(f"{value:.1f}" for value in times), f"{difference:.1e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
