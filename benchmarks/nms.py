"""Compare this project's non-maximum suppression with torchvision's on many groups of overlapping boxes.

    python benchmarks/nms.py [--device cpu|cuda] [--rounds N] [--threads 1 2] [--large]

Each line of the output is one case and one number of threads. In each round all implementations run once, one after the
other, so that other load on the machine affects all of them. Times are medians over the rounds in milliseconds; a ratio
is the median over the rounds of an implementation's time divided by ``nms_mask``'s time in the same round.

- ``nms_mask``: ``cpm_rcnn.ops.nms.nms_mask`` in float32.
- ``per group``: ``torchvision.ops.nms`` in a loop over the groups, float32. The rows of the groups are given.
- ``batched_nms``: ``torchvision.ops.batched_nms``, float32.
- ``grouped_nms``: ``cpm_rcnn.models.nms.grouped_nms``, ``nms_mask`` in float64 and the sorting of the rows.
- ``grouped_nms before``: the same function before ``nms_mask`` existed: ``batched_nms`` in float64.

The boxes lie around random objects, about 15 per object, as the highest-scored proposals of an image do. The results of
``nms_mask`` and of the loop over the groups are compared, and a difference is an error.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from cpm_rcnn.models.nms import grouped_nms
from cpm_rcnn.ops.nms import nms_mask

# groups, boxes per group, threshold
CASES = {
    "RPN: 2 images x 5 levels x 1000 boxes": (10, 1000, 0.7),
    "head: 100 classes x 100 boxes": (100, 100, 0.3),
    "2000 groups of 5 boxes": (2000, 5, 0.3),
    "one group of 10000 boxes": (1, 10000, 0.7),
}
LARGE = {"one group of 100000 boxes": (1, 100000, 0.7)}
BOXES_PER_OBJECT = 15


def make(groups: int, count: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (R, 4), scores (R,) and groups (R,) of an image of 1333 x 800 pixels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    objects = max(count // BOXES_PER_OBJECT, 1)
    centers = torch.rand(groups, objects, 2, generator=generator) * torch.tensor([1333.0, 800.0])
    sizes = (0.6 * normal(groups, objects, 2) + 4.3).exp()
    of = torch.randint(objects, (groups, count, 1), generator=generator).expand(-1, -1, 2)
    size = sizes.gather(1, of)
    center = centers.gather(1, of) + 0.1 * normal(groups, count, 2) * size
    size = size * (0.15 * normal(groups, count, 2)).exp()
    boxes = torch.cat([center - size / 2, center + size / 2], 2).flatten(0, 1)
    scores = torch.rand(groups * count, generator=generator)
    return boxes.to(device), scores.to(device), torch.arange(groups).repeat_interleave(count).to(device)


def per_group(boxes: Tensor, scores: Tensor, rows: list[Tensor], threshold: float) -> Tensor:
    return torch.cat([group[nms(boxes[group], scores[group], threshold)] for group in rows])


def seconds(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(groups: int, count: int, threshold: float, device: str, rounds: int) -> list[str]:
    """The cells of one line of the table."""
    boxes, scores, group = make(groups, count, device)
    rows = list(torch.arange(len(boxes), device=device).split(count))
    mask = nms_mask(boxes, scores, group, threshold)
    expected = torch.zeros_like(mask)
    expected[per_group(boxes, scores, rows, threshold)] = True
    assert torch.equal(mask, expected), "nms_mask differs from torchvision"
    implementations: list[Callable[[], Any]] = [
        lambda: nms_mask(boxes, scores, group, threshold),
        lambda: per_group(boxes, scores, rows, threshold),
        lambda: batched_nms(boxes, scores, group, threshold),
        lambda: grouped_nms(boxes, scores, group, threshold, torch.ones_like(mask)),
        lambda: batched_nms(boxes.double(), scores.double(), group, threshold),
    ]
    times = [[seconds(work, device) for work in implementations] for _ in range(rounds + 1)][1:]
    cells = [f"{mask.float().mean().item():.0%}"]
    for i in range(len(implementations)):
        cells.append(f"{1e3 * statistics.median(line[i] for line in times):.2f}")
        if i:
            cells.append(f"{statistics.median(line[i] / line[0] for line in times):.1f}")
    before = statistics.median(line[4] / line[3] for line in times)
    return [*cells, f"{before:.1f}"]


def main(arguments: argparse.Namespace) -> None:
    """Print the table."""
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    print(f"{name}, torch {torch.__version__}, {arguments.rounds} rounds\n")
    columns = ["case", "threads", "kept", "nms_mask ms", "per group ms", "ratio", "batched_nms ms", "ratio"]
    columns += ["grouped_nms ms", "ratio", "grouped_nms before ms", "ratio", "before / grouped_nms"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for case, (groups, count, threshold) in (CASES | (LARGE if arguments.large else {})).items():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            rounds = min(arguments.rounds, 2) if case in LARGE else arguments.rounds
            cells = measure(groups, count, threshold, arguments.device, rounds)
            print("| " + " | ".join([case, str(threads), *cells]) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--large", action="store_true", help="also measure one group of 100000 boxes, in two rounds")
    main(parser.parse_args())
