"""The compiled CPU kernel, compared with torchvision's operator in float64."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ops import deform_conv_sweep

pytestmark = pytest.mark.usefixtures("cpu_kernels")


class DeformConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, offset, mask, weight, geometry):
        ctx.save_for_backward(input, offset, mask, weight)
        ctx.geometry = geometry
        return torch.ops.cpm_rcnn_cpu.deform_conv2d(input, offset, mask, weight, *geometry)

    @staticmethod
    def backward(ctx, grad):
        needed = list(ctx.needs_input_grad[:4])
        grads = torch.ops.cpm_rcnn_cpu.deform_conv2d_backward(grad, *ctx.saved_tensors, *ctx.geometry, needed)
        return *(g if n else None for g, n in zip(grads, needed)), None


def size_out(size, kernel, geometry, axis):
    stride, padding, dilation = (pair[axis] for pair in geometry)
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def inputs(
    images=1, groups=1, offset_groups=1, per_group=8, out_per_group=8, size=(9, 12), kernel=(3, 3),
    geometry=((1, 1), (1, 1), (1, 1)), masked=False, dtype=torch.float32, seed=0, offsets="normal",
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    height, width = (size_out(size[axis], kernel[axis], geometry, axis) for axis in (0, 1))
    taps = kernel[0] * kernel[1]
    offset = 2 * random(images, 2 * offset_groups * taps, height, width)
    if offsets == "integer":
        offset = offset.round()
    elif offsets == "border":  # every sample has the coordinate -1, 0, size - 1 or size on an axis
        ys = torch.tensor([-1.0, 0.0, size[0] - 1.0, size[0]], dtype=torch.float64)
        xs = torch.tensor([-1.0, 0.0, size[1] - 1.0, size[1]], dtype=torch.float64)
        picked = torch.randint(4, offset.shape, generator=generator)
        for tap in range(offset_groups * taps):
            i, j = tap % taps // kernel[1], tap % kernel[1]
            row = torch.arange(height)[:, None] * geometry[0][0] - geometry[1][0] + i * geometry[2][0]
            column = torch.arange(width) * geometry[0][1] - geometry[1][1] + j * geometry[2][1]
            offset[:, 2 * tap] = ys[picked[:, 2 * tap]] - row
            if tap % 2:
                offset[:, 2 * tap + 1] = xs[picked[:, 2 * tap + 1]] - column
    elif offsets == "far":
        offset *= torch.tensor(10.0, dtype=torch.float64) ** torch.randint(0, 9, offset.shape, generator=generator)
    weight = random(groups * out_per_group, per_group, *kernel) / (per_group * taps) ** 0.5
    mask = random(images, offset_groups * taps, height, width).sigmoid() if masked else None
    return [
        None if x is None else x.to(dtype) for x in (random(images, groups * per_group, *size), offset, mask, weight)
    ]


def assert_close(actual, expected, tolerance, name):
    assert actual.shape == expected.shape, name
    if expected.numel():
        scale = expected.abs().max().clamp_min(1e-3)
        error = (actual.double() - expected).abs().max() / scale
        assert error <= tolerance, f"{name}: largest error is {error:.1e} of the largest value"


def assert_equals_torchvision(tensors, geometry, tolerance, change=lambda x: x):
    """Compare the output and the gradients with torchvision's in float64 for the same values."""
    tensors = [None if x is None else x.detach() for x in tensors]
    ours = [None if x is None else (change(x) if i == 0 else x).requires_grad_() for i, x in enumerate(tensors)]
    exact = [None if x is None else x.detach().double().clone().requires_grad_() for x in tensors]
    stride, padding, dilation = geometry
    expected = torchvision.ops.deform_conv2d(
        exact[0], exact[1], exact[3], None, stride, padding, dilation, mask=exact[2]
    )
    output = DeformConv.apply(*ours, geometry)
    assert output.dtype == tensors[0].dtype
    assert_close(output, expected, tolerance, "output")
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    output.backward(change(grad))
    expected.backward(grad.double())
    for name, x, y in zip(("input", "offset", "mask", "weight"), ours, exact):
        if x is not None:
            assert x.grad.dtype == x.dtype
            # torchvision returns no gradient for an empty batch.
            exact_grad = torch.zeros_like(y) if y.grad is None else y.grad
            assert_close(x.grad, exact_grad, tolerance, f"gradient of {name}")


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 2, 3, 8, 64]))
    per_group = draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16, 24, 40]))
    if groups == 64:
        per_group = min(per_group, 4)
    channels = groups * per_group
    kernel, dilation, padding = draw(pairs(1, 3)), draw(pairs(1, 2)), draw(pairs(0, 2))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding)]
    geometry = (draw(pairs(1, 2)), padding, dilation)
    return {
        "images": draw(st.integers(0, 2)),
        "groups": groups,
        "offset_groups": draw(st.sampled_from([n for n in (1, 2, 3, 4) if channels % n == 0])),
        "per_group": per_group,
        "out_per_group": draw(st.sampled_from([1, 2, 5, 8, 19])),
        "size": tuple(draw(st.integers(n, n + 8)) for n in least),
        "kernel": kernel,
        "geometry": geometry,
        "masked": draw(st.booleans()),
        "offsets": draw(st.sampled_from(["normal", "integer", "border", "far"])),
        "seed": draw(st.integers(0, 1000)),
    }


def layouts():
    return st.sampled_from(
        [
            lambda x: x,
            lambda x: x.contiguous(memory_format=torch.channels_last),
            lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
            lambda x: torch.stack([x, x], dim=-1)[..., 0],
        ]
    )


sweep = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@sweep
@given(problems(), layouts())
def test_float32_equals_torchvision(arguments, layout):
    assert_equals_torchvision(inputs(**arguments), arguments["geometry"], 1e-5, layout)


@sweep
@given(problems(), layouts())
def test_float64_equals_torchvision(arguments, layout):
    assert_equals_torchvision(inputs(dtype=torch.float64, **arguments), arguments["geometry"], 1e-12, layout)


@sweep
@given(problems(), layouts())
def test_bfloat16_equals_torchvision_to_bfloat16_precision(arguments, layout):
    assert_equals_torchvision(inputs(dtype=torch.bfloat16, **arguments), arguments["geometry"], 2e-2, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_group", [8, 16, 32])
def test_grouped_backbone_shapes_equal_torchvision(dtype, per_group):
    tensors = inputs(groups=64, per_group=per_group, out_per_group=per_group, size=(13, 21), dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_equals_torchvision(tensors, ((1, 1), (1, 1), (1, 1)), tolerance)


@pytest.mark.parametrize("masked", [False, True])
# The channels per group are part of a vector, whole vectors, and more than a block.
@pytest.mark.parametrize(("groups", "per_group"), [(2, 3), (3, 8), (1, 20)])
def test_gradients_are_the_derivatives_of_the_output(groups, per_group, masked):
    tensors = inputs(1, groups, 1, per_group, 2, (3, 3), (2, 2), masked=masked, dtype=torch.float64)
    tensors = [None if x is None else x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(
        lambda *some: DeformConv.apply(*some, ((1, 1), (1, 1), (1, 1))), tensors, fast_mode=False, atol=1e-6
    )


@pytest.mark.parametrize("wanted", [[i == j for j in range(4)] for i in range(4)] + [[True] * 4, [False] * 4])
def test_only_the_gradients_that_are_needed_are_returned(wanted):
    tensors = inputs(groups=2, masked=True)
    geometry = ((1, 1), (1, 1), (1, 1))
    grad = torch.randn(1, 16, 9, 12)
    every = torch.ops.cpm_rcnn_cpu.deform_conv2d_backward(grad, *tensors, *geometry, [True] * 4)
    some = torch.ops.cpm_rcnn_cpu.deform_conv2d_backward(grad, *tensors, *geometry, wanted)
    for x, y, needed in zip(some, every, wanted):
        if needed:
            torch.testing.assert_close(x, y)
        else:
            assert x is None or x.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_offsets_give_nan_in_the_gradients_that_are_needed(dtype, value):
    """Every combination of needed gradients is another kernel. test_deform_conv_nonfinite.py tests the values."""
    input, offset, mask, weight = inputs(groups=2, per_group=3, masked=True, dtype=dtype)
    geometry = ((1, 1), (1, 1), (1, 1))
    offset[:, :, 4] = value
    output = torch.ops.cpm_rcnn_cpu.deform_conv2d(input, offset, mask, weight, *geometry)
    assert output[:, :, 4].isnan().all()
    assert output[:, :, [*range(4), *range(5, 9)]].isfinite().all()
    for needed in itertools.product([False, True], repeat=4):
        grads = torch.ops.cpm_rcnn_cpu.deform_conv2d_backward(
            torch.ones_like(output), input, offset, mask, weight, *geometry, needed
        )
        for i, rows_that_are_nan in ((1, [4]), (2, [4]), (3, [0, 1, 2])):
            if needed[i]:
                assert grads[i].isnan().any(3).any(1).any(0).nonzero().flatten().tolist() == rows_that_are_nan
        assert not needed[0] or grads[0].isfinite().all()


def test_random_layouts_and_sides_of_length_0_and_1_equal_torchvision():
    # This test also runs once per instruction set.
    failures = deform_conv_sweep.run(range(30 if os.environ.get("ATEN_CPU_CAPABILITY") else 200))
    assert not failures, "\n".join(failures[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(300, 3), (3, 300), (3, 3)])
def test_an_output_that_is_one_pixel_wide_or_high_has_correct_gradients_for_any_stride_of_that_side(dtype, size):
    tensors = inputs(images=2, out_per_group=4, size=size, geometry=((1, 1), (0, 0), (1, 1)), dtype=dtype)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]

    def transposed(x):
        # The gradient of a transposed output. Its sides of length 1 have the stride of another side.
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    assert_equals_torchvision(tensors, ((1, 1), (0, 0), (1, 1)), tolerance, transposed)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("images", [0, 2])
def test_an_input_without_rows_or_columns_gives_zeros(size, images):
    geometry = ((1, 1), (2, 2), (1, 1))
    assert_equals_torchvision(inputs(images=images, size=size, geometry=geometry, masked=True), geometry, 0)


def test_an_input_too_large_for_the_index_of_a_sample_raises_an_error():
    # 4.9e9 pixels that share one number in memory.
    input = torch.zeros(1, 1, 1, 1).expand(1, 1, 70000, 70000)
    with pytest.raises(RuntimeError, match="an input of 70000x70000 is too large"):
        torch.ops.cpm_rcnn_cpu.deform_conv2d(
            input, torch.zeros(1, 2, 1, 1), None, torch.ones(1, 1, 1, 1), (70000, 70000), (0, 0), (1, 1)
        )


def test_elements_past_the_first_2_to_the_32_are_addressed(tmp_path):
    """Compile and run a program that reserves large planes, but only touches the pages of one sample."""
    compiler = shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    source, program = Path(__file__).with_name("large_plane.cpp"), tmp_path / "large_plane"
    kernels = Path(__file__).parents[2] / "kernels"
    subprocess.run([compiler, "-std=c++20", "-O1", f"-I{kernels}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout


def test_samples_outside_the_image_do_not_read_it():
    input, offset, _, weight = inputs()
    input[:] = float("nan")
    offset[:] = 1000
    output = torch.ops.cpm_rcnn_cpu.deform_conv2d(input, offset, None, weight, (1, 1), (1, 1), (1, 1))
    assert not output.any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_are_correct_and_reproducible_for_any_number_of_threads(threads):
    tensors = inputs(groups=16, per_group=8, offset_groups=2, masked=True)
    geometry = ((1, 1), (1, 1), (1, 1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_equals_torchvision(tensors, geometry, 1e-5)
        tensors = [x.detach() for x in tensors]
        grad = torch.randn(1, 128, 9, 12)
        runs = [torch.ops.cpm_rcnn_cpu.deform_conv2d_backward(grad, *tensors, *geometry, [True] * 4) for _ in range(2)]
        assert all(torch.equal(x, y) for x, y in zip(*runs))
    finally:
        torch.set_num_threads(before)


def test_channels_last_inputs_give_channels_last_outputs():
    tensors = inputs(images=2, groups=2)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    output = torch.ops.cpm_rcnn_cpu.deform_conv2d(*tensors, (1, 1), (1, 1), (1, 1))
    assert output.is_contiguous(memory_format=torch.channels_last)
    grads = torch.ops.cpm_rcnn_cpu.deform_conv2d_backward(
        output, *tensors, (1, 1), (1, 1), (1, 1), [True, True, False, True]
    )
    assert grads[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x, o, m, w: (x[0], o, m, w), "4 dimensions"),
        (lambda x, o, m, w: (x, o[:, 1:], m, w), "not a multiple"),
        (lambda x, o, m, w: (x, o[..., 1:], m, w), "offset is 9x11"),
        (lambda x, o, m, w: (x, o, m[:, 1:], w), "mask.size"),
        (lambda x, o, m, w: (x, o, m, w.double()), "one dtype"),
        (lambda x, o, m, w: (x[:, 1:], o, m, w), "not a multiple of weight.size"),
        (lambda x, o, m, w: (x.half(), o.half(), m.half(), w.half()), "not implemented for Half"),
    ],
)
def test_invalid_arguments_raise_an_error(broken, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cpm_rcnn_cpu.deform_conv2d(*broken(*inputs(masked=True)), (1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_these_tests_pass_for_every_instruction_set(capability):
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this run already tests one instruction set")
    environment = dict(os.environ, ATEN_CPU_CAPABILITY=capability)
    names = "grouped or non_finite or derivatives or channels_last or random_layouts or one_pixel"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", names, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
