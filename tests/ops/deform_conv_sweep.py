"""Random deformable convolutions over memory layouts, for the tests and for benchmarks/sanitize_kernels.py.

python tests/ops/deform_conv_sweep.py [--library FILE] [--cases N]

Each case has sides of length 0 and 1, and each of its tensors has a random layout: contiguous, channels-last, strided,
expanded, or with arbitrary strides for sides of length 1. The reference is torchvision's operator in float64 on
contiguous copies of the same values, with the rule for non-finite offsets that ops/deform_conv_backends.py adds.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from cpm_rcnn.ops import deform_conv_backends as backends

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    tensors: list[Tensor | None]  # input, offset, mask, weight
    grad_output: Tensor
    geometry: list[tuple[int, int]]  # stride, padding, dilation
    needed: list[bool]


def relayout(x, rng):
    """Return a tensor of the same shape in a random memory layout. An expanded layout also changes its values."""
    kind = rng.choice(["contiguous", "channels_last", "permuted", "sliced", "expanded", "arbitrary"])
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "permuted":
        order = rng.sample(range(4), 4)
        x = x.permute(order).contiguous().permute([order.index(i) for i in range(4)])
    elif kind == "sliced":
        larger = torch.full([2 * side + 1 for side in x.shape], torch.nan, dtype=x.dtype)
        view = larger[tuple(slice(1, None, 2) for _ in x.shape)]
        x = view.copy_(x)
    elif kind == "expanded":
        dims = [d for d in range(4) if x.shape[d] > 1]
        if dims and x.numel():
            d = rng.choice(dims)
            x = x.narrow(d, 0, 1).expand(x.shape)
    if kind in ("arbitrary", "channels_last", "permuted") and x.numel():
        # The strides of sides of length 1 have no effect on a tensor's values.
        strides = [rng.choice([0, 1, 2, 3, 7, 10**6]) if n == 1 else s for n, s in zip(x.shape, x.stride())]
        x = x.as_strided(x.shape, strides)
    return x


def draw_axis(rng, long):
    """Return the input size, output size, kernel size, stride, padding and dilation of one axis."""
    kernel, stride, padding, dilation = (rng.randint(*limits) for limits in ((1, 3), (1, 2), (0, 2), (1, 2)))
    out = rng.choice([1, 1, 1, 2, 3, 5, 9]) if not long else rng.randint(20, 300)
    extent = dilation * (kernel - 1) + 1
    size = max((out - 1) * stride + extent - 2 * padding + rng.randint(0, stride - 1), 0)
    if size + 2 * padding < extent:
        size = extent - 2 * padding
    return size, (size + 2 * padding - extent) // stride + 1, kernel, stride, padding, dilation


def draw(seed):
    """Return the case of a seed."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = list(TOLERANCE)[seed % 3]
    groups, offset_groups = rng.choice([1, 1, 2, 3, 8]), rng.choice([1, 1, 2, 3])
    per_group = rng.choice([1, 2, 3, 4, 8, 16, 24])
    while groups * per_group % offset_groups:
        offset_groups -= 1
    out_per_group = rng.choice([1, 2, 4, 5, 8])
    images = rng.choice([0, 1, 1, 2, 3])
    long = rng.choice([0, 1, None, None])
    (height, out_h, kh, sh, ph, dh), (width, out_w, kw, sw, pw, dw) = (draw_axis(rng, long == axis) for axis in (0, 1))
    taps = kh * kw

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # float32 represents the positions of these samples exactly.
    offset = (128 * normal(images, 2 * offset_groups * taps, out_h, out_w)).round() / 64
    mask = normal(images, offset_groups * taps, out_h, out_w).sigmoid() if rng.random() < 0.5 else None
    tensors = [
        normal(images, groups * per_group, height, width),
        offset,
        mask,
        normal(groups * out_per_group, per_group, kh, kw) / (per_group * taps) ** 0.5,
    ]
    tensors = [None if x is None else relayout(x.to(dtype), rng) for x in tensors]
    if rng.random() < 0.25:
        lost = torch.rand(tensors[1].shape, generator=generator) < 0.02
        value = rng.choice([torch.nan, torch.inf, -torch.inf])
        strides = tensors[1].stride()
        tensors[1] = tensors[1].masked_fill(lost, value)
        if all(n < 2 or s for n, s in zip(tensors[1].shape, strides)) and tensors[1].numel():
            tensors[1] = torch.empty_strided(tensors[1].shape, strides, dtype=dtype).copy_(tensors[1])
    grad = relayout(normal(images, groups * out_per_group, out_h, out_w).to(dtype), rng)
    # Three of four cases compute all gradients.
    needed = [True] * 4 if rng.random() < 0.75 else [rng.random() < 0.5 for _ in range(4)]
    return Case(tensors, grad, [(sh, sw), (ph, pw), (dh, dw)], needed)


def assert_close(name, actual, expected, tolerance):
    assert actual.shape == expected.shape, f"{name}: shape is {tuple(actual.shape)}"
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: other values are finite"
    actual, expected = actual.double()[finite], expected[finite]
    if expected.numel():
        error = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()
        assert error <= tolerance, f"{name}: largest error is {error:.1e} of the largest value"


def check(case):
    """Compare the compiled kernel with the reference. Raises AssertionError."""
    dtype = case.grad_output.dtype
    exact = [None if x is None else x.double().contiguous() for x in case.tensors]
    grad_output = case.grad_output.double().contiguous()
    expected = backends.TORCHVISION.forward(*exact, *case.geometry)
    gradients = backends.TORCHVISION.backward(grad_output, *exact, *case.geometry, case.needed)
    assert_close(
        "output", torch.ops.cpm_rcnn_cpu.deform_conv2d(*case.tensors, *case.geometry), expected, TOLERANCE[dtype]
    )
    actual = torch.ops.cpm_rcnn_cpu.deform_conv2d_backward(case.grad_output, *case.tensors, *case.geometry, case.needed)
    for name, tensor, mine, theirs, needed in zip(
        ("input", "offset", "mask", "weight"), case.tensors, actual, gradients, case.needed
    ):
        if tensor is not None and needed:
            assert_close(f"gradient of {name}", mine, theirs, TOLERANCE[dtype])


def describe(seed, case):
    tensors = zip(("input", "offset", "mask", "weight", "grad_output"), [*case.tensors, case.grad_output])
    shapes = (f"{name} {tuple(x.shape)} strides {x.stride()}" for name, x in tensors if x is not None)
    return f"case {seed}, {case.grad_output.dtype}: {', '.join(shapes)}, stride, padding, dilation {case.geometry}"


def run(seeds):
    """Check all cases, and return one line per case that fails."""
    failures = []
    for seed in seeds:
        case = draw(seed)
        try:
            check(case)
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{error}\n  {describe(seed, case)}")
    return failures


if __name__ == "__main__":
    from sweep_script import main

    def find_failures(cases):
        return cases, run(range(cases))

    main(__doc__, backends.load_cpu_kernel, find_failures, 600)
