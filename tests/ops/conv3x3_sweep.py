"""Random cases of the 3x3 convolution and its gradients, for the tests and for benchmarks/sanitize_kernels.py.

python tests/ops/conv3x3_sweep.py [--library FILE] [--cases N]

The expected results are those of torch's convolution in float64. The cases have 0 to 3 images of all sides from 1 to
13, which need tiles of all sizes; float32, bfloat16, and bfloat16 with float32 weights; and tensors with arbitrary
strides.
"""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpm_rcnn.ops import conv3x3 as ops

# The largest error, in units of the root mean square of the expected values.
TOLERANCE = 3e-5


class Case(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    grad_output: Tensor


def draw(seed):
    """Return the case of a seed."""
    rng = random.Random(seed)
    shape = (rng.choice([0, 1, 1, 2, 3]), 32 * rng.randint(1, 4), rng.randint(1, 13), rng.randint(1, 13))
    return make(*shape, 32 * rng.randint(1, 4), rng.choice([torch.float32, torch.bfloat16]), rng)


def make(images, channels, height, width, out_channels, dtype=torch.float32, rng=None):
    """Return a case of these sizes; with ``rng``, strides are random and the weight may be float32."""
    generator = torch.Generator().manual_seed(channels + height)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def strided(x):
        order = rng.sample(range(x.ndim), x.ndim)
        x = x.permute(order).contiguous().permute([order.index(side) for side in range(x.ndim)])
        return torch.stack([x, x], -1)[..., 0] if rng.random() < 0.3 else x

    input, grad_output = (normal(images, count, height, width) for count in (channels, out_channels))
    weight, bias = normal(out_channels, channels, 3, 3) / (9 * channels) ** 0.5, normal(out_channels)
    if rng is not None:
        input, weight, grad_output = strided(input), strided(weight), strided(grad_output)
        weight = rng.choice([weight, weight.float()])
        bias = rng.choice([bias, None])
    return Case(input, weight, bias, grad_output)


def results(case):
    """Output, gradient of the input and gradient of the weight by the compiled kernel."""
    kernel = torch.ops.cpm_rcnn_cpu
    return (
        kernel.conv3x3(case.input, case.weight, case.bias),
        kernel.conv3x3_grad_input(case.grad_output, case.weight),
        kernel.conv3x3_grad_weight(case.grad_output, case.input, case.weight.dtype),
    )


def expected_results(case):
    """The same in float64 by torch."""
    input, weight, bias, grad_output = (None if x is None else x.double() for x in case)
    return (
        F.conv2d(input, weight, bias, padding=1),
        torch.nn.grad.conv2d_input(input.shape, weight, grad_output, padding=1),
        torch.nn.grad.conv2d_weight(input, weight.shape, grad_output, padding=1),
    )


def error(found, expected):
    """The largest error of a result beyond the rounding to its dtype, over the root mean square of the expected one."""
    if expected.numel() == 0 or not expected.any():
        return float(found.any())
    rounding = torch.finfo(torch.bfloat16).eps / 2 * 1.01 if found.dtype is torch.bfloat16 else 0.0
    excess = ((found.double() - expected).abs() - rounding * expected.abs()).clamp(min=0)
    return (excess.max() / expected.square().mean().sqrt()).item()


def run(seeds):
    """Compute cases, and return one line per result that is wrong."""
    failures = []
    for seed in seeds:
        case = draw(seed)
        dtypes = case.input.dtype, case.input.dtype, case.weight.dtype
        names = "output", "input", "weight"
        for name, dtype, found, expected in zip(names, dtypes, results(case), expected_results(case)):
            right = found.dtype is dtype and found.shape == expected.shape
            if not right or not error(found, expected) < TOLERANCE:
                shapes = f"{tuple(case.input.shape)} with {tuple(case.weight.shape)}, {case.input.dtype}, {dtypes[2]}"
                failures.append(f"case {seed}: {name} of {shapes}: error {error(found, expected):.1e}")
    return failures


if __name__ == "__main__":
    from sweep_script import main

    def find_failures(cases):
        torch.set_num_threads(2)
        return cases, run(range(cases))

    main(__doc__, ops.load_cpu_kernel, find_failures, 200)
