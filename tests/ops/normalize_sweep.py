"""Random cases of the normalization of images, for the tests and for benchmarks/sanitize_kernels.py.

python tests/ops/normalize_sweep.py [--library FILE] [--cases N]

The expected values are those of torch's operators, to the last bit. Images are contiguous, have their channels last,
or have arbitrary strides; the result is a part of a larger tensor, whose other values must not change.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from cpm_rcnn.ops import normalize


class Case(NamedTuple):
    image: Tensor
    mean: Tensor
    std: Tensor
    reverse: bool
    out: Tensor


def normalize_image(image, mean, std, reverse, out):
    """The operations of torch."""
    channels = image.flip(0) if reverse else image
    out.copy_((channels.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def draw(seed):
    """Return the case of a seed; ``out`` is a view of a larger tensor."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    height = rng.choice([0, 1, 2, rng.randint(3, 40), 700])
    width = rng.choice([0, 1, 2, 3, rng.randint(3, 70), rng.randint(3, 300)])
    sides = (height + rng.randint(0, 3), width + rng.randint(0, 3))
    order = rng.choice([(0, 1, 2), (1, 2, 0), (1, 2, 0), (2, 1, 0), (1, 0, 2), (2, 0, 1), (0, 2, 1)])
    stored = torch.randint(0, 256, [(3, *sides)[i] for i in order], dtype=torch.uint8, generator=generator)
    image = stored.permute([order.index(i) for i in range(3)])
    y, x = rng.randint(0, sides[0] - height), rng.randint(0, sides[1] - width)
    image = image[:, y : y + height, x : x + width]
    if rng.random() < 0.1:
        image = image[:1].expand(3, -1, -1)
    mean = 255 * torch.rand(3, generator=generator)
    std = 0.1 + 100 * torch.rand(3, generator=generator)
    whole = torch.full((3, *sides), 7.0)
    return Case(image, mean, std, rng.random() < 0.5, whole[:, y : y + height, x : x + width])


def is_right(case):
    """Whether the kernel writes what torch's operations write, and nothing else."""
    expected = case.out._base.clone()
    normalize_image(*case[:4], expected.as_strided(case.out.shape, case.out.stride(), case.out.storage_offset()))
    torch.ops.cpm_rcnn_cpu.normalize_image(*case)
    return torch.equal(case.out._base, expected)


def run(seeds):
    """Compare the kernel with torch's operations, and return one line per case that differs."""
    cases = ((seed, draw(seed)) for seed in seeds)
    return [
        f"case {seed}: {tuple(case.image.shape)}, strides {case.image.stride()}, reverse {case.reverse}"
        for seed, case in cases
        if not is_right(case)
    ]


if __name__ == "__main__":
    from sweep_script import main

    def find_failures(cases):
        torch.set_num_threads(2)
        return cases, run(range(cases))

    main(__doc__, normalize.load_cpu_kernel, find_failures, 600)
