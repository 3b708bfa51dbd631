"""Random cases of non-maximum suppression, for the tests and for benchmarks/sanitize_kernels.py.

python tests/ops/nms_sweep.py [--library FILE] [--cases N]

The expected result is that of torchvision.ops.nms for the valid rows of each group. Many cases have integer coordinates
and thresholds such as 1/3, so that IoUs are equal to the threshold; few different scores; boxes that are empty,
inverted, NaN or infinite; and tensors with arbitrary strides.
"""

import random
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from cpm_rcnn.ops import nms

THRESHOLDS = [0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7, 1.0, -0.1, 2.0, float("nan")]


class Case(NamedTuple):
    boxes: Tensor
    scores: Tensor
    groups: Tensor
    iou_threshold: float
    valid: Tensor | None


def expected_mask(boxes, scores, groups, iou_threshold, valid=None):
    """The result of torchvision's operator for each group."""
    mask = torch.zeros(len(boxes), dtype=torch.bool)
    valid = torch.ones_like(mask) if valid is None else valid
    for group in groups[valid].unique():
        rows = ((groups == group) & valid).nonzero().squeeze(1)
        # The operator needs one dtype of boxes and scores. Only the order of the scores matters.
        order = scores[rows].sort(descending=True, stable=True).indices
        ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        mask[rows[torchvision.ops.nms(boxes[rows], -ranks.to(boxes.dtype), iou_threshold)]] = True
    return mask


def draw(seed, longest=300):
    """Return the case of a seed. Its number of rows is at most ``longest``."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype, score_dtype = rng.choice([torch.float32, torch.float64]), rng.choice([torch.float32, torch.float64])
    count = rng.choice([0, 1, 2, 3, rng.randint(4, 40), rng.randint(4, longest), longest])

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def chance(probability, *shape):
        return uniform(*shape) < probability

    kind = rng.choice(["integer", "integer", "real", "clustered", "any corners"])
    corner, size = 12 * uniform(count, 2), 8 * uniform(count, 2)
    if kind == "integer":
        corner, size = corner.floor(), size.floor()
    elif kind == "clustered":
        corner, size = corner.floor() + 0.1 * uniform(count, 2), 4 + 0.5 * uniform(count, 2)
    elif kind == "any corners":
        size = 12 * uniform(count, 2) - corner
    boxes = torch.cat([corner, corner + size], 1) * rng.choice([1, 1, 1, 100, 1e-20, 1e20])
    for value in (torch.nan, torch.inf, -torch.inf):
        if rng.random() < 0.15:
            boxes[chance(0.02, count, 4)] = value
    scores = uniform(count) - rng.choice([0, 0.5])
    if rng.random() < 0.6:
        scores = (rng.choice([1, 3, 20]) * scores).round()  # equal scores, and zeros of both signs
    if rng.random() < 0.15:
        scores[chance(0.1, count)] = rng.choice([torch.nan, torch.inf, -torch.inf])
    if rng.random() < 0.2:
        scores = scores.sort(descending=True).values
    groups = torch.randint(rng.choice([1, 2, 7, 100, 10**6]), (count,), generator=generator)
    groups = groups * rng.choice([1, 1, -1, 2**40]) + rng.choice([0, 0, -5, 2**62])
    valid = chance(rng.choice([0, 0.5, 0.9]), count) if rng.random() < 0.5 else None
    boxes, scores = boxes.to(dtype), scores.to(score_dtype)
    if rng.random() < 0.3:
        boxes = boxes.t().contiguous().t()
    if rng.random() < 0.3:
        scores, groups = (torch.stack([x, x], 1)[:, 0] for x in (scores, groups))
        valid = None if valid is None else torch.stack([valid, ~valid], 1)[:, 0]
    return Case(boxes, scores, groups, rng.choice(THRESHOLDS), valid)


def describe(seed, case):
    boxes, scores, groups, threshold, valid = case
    return (
        f"case {seed}: boxes {tuple(boxes.shape)} {boxes.dtype}, scores {scores.dtype}, {len(groups.unique())} groups, "
        f"threshold {threshold}, {'all' if valid is None else int(valid.sum())} valid"
    )


def run(function, seeds, longest=300):
    """Compare a function with torchvision's operator, and return one line per case that differs."""
    cases = ((seed, draw(seed, longest)) for seed in seeds)
    return [describe(seed, case) for seed, case in cases if not torch.equal(function(*case), expected_mask(*case))]


if __name__ == "__main__":
    from sweep_script import main

    def find_failures(cases):
        torch.set_num_threads(2)
        kernel = torch.ops.cpm_rcnn_cpu.nms_mask
        # The long cases divide one group among the threads.
        return cases + 10, run(kernel, range(cases)) + run(kernel, range(cases, cases + 10), longest=2500)

    main(__doc__, nms.load_cpu_kernel, find_failures, 600)
