"""The Triton kernels, run on a GPU if there is one, and otherwise on a CPU under Triton's interpreter.

``conftest.py`` selects the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

pytest.importorskip("triton")

from cpm_rcnn.kernels import deform_conv_triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(batch, channels, out, groups, offset_groups, size, kernel, stride, padding, dilation, masked, spread):
    torch.manual_seed(0)
    device = DEVICE
    h, w = ((side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side in size)
    return {
        "input": torch.randn(batch, channels, *size, device=device),
        "offset": torch.randn(batch, 2 * offset_groups * kernel**2, h, w, device=device) * spread,
        "mask": torch.rand(batch, offset_groups * kernel**2, h, w, device=device) if masked else None,
        "weight": torch.randn(out, channels // groups, kernel, kernel, device=device),
        "geometry": ((stride, stride), (padding, padding), (dilation, dilation)),
    }


def torchvision_results(case, grad=None):
    """Return torchvision's output, the output gradient, and the gradients of input, offset, mask and weight."""
    leaves = {k: v.clone().requires_grad_() for k, v in case.items() if isinstance(v, torch.Tensor)}
    output = torchvision.ops.deform_conv2d(
        leaves["input"], leaves["offset"], leaves["weight"], None, *case["geometry"], leaves.get("mask")
    )
    grad = torch.randn_like(output) if grad is None else grad
    output.backward(grad)
    return (
        output.detach(),
        grad,
        [leaves[k].grad if k in leaves else None for k in ("input", "offset", "mask", "weight")],
    )


def triton_results(case, grad, dtype=torch.float32):
    given = [None if case[k] is None else case[k].to(dtype) for k in ("input", "offset", "mask", "weight")]
    output = kernels.forward(*given, *case["geometry"])
    return output, kernels.backward(grad.to(dtype), *given, *case["geometry"], (True, True, given[2] is not None, True))


def assert_close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert (ours.float() - theirs).abs().max() <= tolerance * max(theirs.abs().max().item(), 1e-3)


# batch, channels, outputs, groups, offset groups, size, kernel, stride, padding, dilation, masked, spread of offsets
CASES = {
    "8 channels per group, as in C3": (1, 32, 32, 4, 1, (6, 7), 3, 1, 1, 1, False, 1.5),
    "16 channels per group, as in C4, stride 2": (2, 32, 32, 2, 1, (7, 6), 3, 2, 1, 1, False, 1.5),
    "32 channels per group, as in C5, masked": (1, 64, 64, 2, 1, (4, 5), 3, 1, 1, 1, True, 1.5),
    "more pixels than one tile": (2, 8, 8, 1, 1, (9, 11), 3, 1, 1, 1, True, 1.0),
    "no groups, odd channels": (1, 20, 24, 1, 1, (5, 6), 3, 1, 1, 1, True, 1.0),
    "channels in several blocks": (1, 80, 96, 1, 1, (4, 5), 1, 1, 0, 1, True, 1.0),
    "offset groups within a group": (1, 24, 8, 1, 3, (5, 4), 2, 1, 0, 1, True, 1.0),
    "groups within an offset group": (1, 32, 32, 8, 2, (5, 4), 2, 1, 1, 1, True, 1.0),
    "depthwise": (1, 8, 8, 8, 8, (4, 5), 3, 1, 2, 2, True, 1.0),
    "samples far outside the image": (1, 8, 8, 2, 1, (5, 6), 3, 1, 1, 1, True, 30.0),
    "one pixel": (1, 8, 8, 1, 1, (1, 1), 1, 1, 0, 1, False, 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_torchvision(name):
    case = make(*CASES[name])
    expected, grad, gradients = torchvision_results(case)
    output, ours = triton_results(case, grad)
    assert_close(output, expected, 1e-5)
    for mine, theirs in zip(ours, gradients):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_close(mine, theirs, 1e-5)


def test_kernels_equal_torchvision_for_integer_offsets_and_samples_on_the_border():
    case = make(1, 16, 16, 2, 1, (5, 6), 3, 1, 1, 1, True, 1.0)
    case["offset"] = torch.randint(-6, 7, case["offset"].shape, device=DEVICE).float()
    expected, grad, gradients = torchvision_results(case)
    output, ours = triton_results(case, grad)
    assert_close(output, expected, 1e-5)
    for mine, theirs in zip(ours, gradients):
        assert_close(mine, theirs, 1e-5)


def test_non_finite_offsets_give_nan():
    """test_deform_conv_nonfinite.py tests all that they change, under the interpreter. This test also runs on a GPU."""
    case = make(1, 8, 8, 1, 1, (4, 4), 1, 1, 0, 1, False, 0.5)
    case["offset"][:, 0, 0, 0] = float("nan")
    case["offset"][:, 1, 1, 1] = float("inf")
    lost = torch.zeros(4, 4, dtype=torch.bool, device=DEVICE)
    lost[0, 0] = lost[1, 1] = True
    output, (grad_input, grad_offset, _, _) = triton_results(case, torch.ones(1, 8, 4, 4, device=DEVICE))
    assert torch.equal(output.isnan(), lost.expand_as(output))
    assert torch.equal(grad_offset.isnan(), lost.expand_as(grad_offset))
    assert grad_input.isfinite().all()


def test_half_precision_is_summed_in_float32():
    # Only float16 is tested, because Triton's interpreter computes bfloat16 products incorrectly.
    case = make(*CASES["8 channels per group, as in C3"])
    halves = {k: v.half().float() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    expected, grad, gradients = torchvision_results(halves)
    output, ours = triton_results(case, grad.half(), torch.float16)
    assert output.dtype is torch.float16
    assert_close(output, expected, 2e-3)
    for mine, theirs in zip(ours, gradients):
        assert theirs is None or (mine.dtype is torch.float16 and assert_close(mine, theirs, 3e-3) is None)


def test_an_empty_batch_gives_an_empty_output_and_zero_gradients():
    case = make(0, 8, 8, 2, 1, (5, 5), 3, 1, 1, 1, False, 1.0)
    output, (grad_input, grad_offset, _, grad_weight) = triton_results(case, torch.zeros(0, 8, 5, 5, device=DEVICE))
    assert output.shape == (0, 8, 5, 5)
    assert grad_input.shape == (0, 8, 5, 5)
    assert grad_offset.shape == (0, 18, 5, 5)
    assert not grad_weight.any()


def test_only_the_gradients_that_are_needed_are_returned():
    case = make(*CASES["8 channels per group, as in C3"])
    _, grad, gradients = torchvision_results(case)
    given = [case[k] for k in ("input", "offset", "mask", "weight")]
    for i in (0, 1, 3):
        needed = tuple(j == i for j in range(4))
        ours = kernels.backward(grad, *given, *case["geometry"], needed)
        assert [g is not None for g in ours] == list(needed)
        assert_close(ours[i], gradients[i], 1e-5)


def test_unpacking_a_packed_weight_gives_the_weight():
    case = make(*CASES["8 channels per group, as in C3"])
    plan = kernels.Plan(case["input"], case["offset"], case["weight"])
    assert plan.per_pack > 1
    assert torch.equal(plan.unpack_weight(plan.pack_weight(case["weight"])), case["weight"])


def test_unsupported_cases_are_reported_as_such():
    supported = make(1, 12, 12, 2, 2, (4, 4), 3, 1, 1, 1, False, 1.0)
    crossing = make(1, 12, 12, 2, 3, (4, 4), 3, 1, 1, 1, False, 1.0)
    assert kernels.supports(supported["input"], supported["offset"], supported["weight"])
    assert not kernels.supports(crossing["input"], crossing["offset"], crossing["weight"])
    assert not kernels.supports(supported["input"].double(), supported["offset"], supported["weight"])
    input, offset, weight = (x.to("meta") for x in (supported["input"], supported["offset"], supported["weight"]))
    # 2^31 output pixels.
    assert not kernels.supports(input.expand(2**27, -1, -1, -1), offset.expand(2**27, -1, -1, -1), weight)


def test_kernels_compile_for_an_h100():
    """Compile to machine code, which needs no GPU, and check that half precision uses tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_h100.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 9
    for each in results:
        assert each["bytes"] > 0
        assert each["tensor_cores"] == (each["dtype"] != "torch.float32"), each
        # The input gradient is accumulated with atomic additions of four channels at a time.
        assert each["vector_atomics"] == (each["kernel"] == "_backward_data"), each


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_dtype_equals_torchvision_on_a_gpu(name, dtype):
    case = make(*CASES[name])
    # Round the values to the dtype first, so that only the arithmetic differs.
    case = {k: v.to(dtype).float() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    grad = torch.randn_like(torchvision_results(case)[0]).to(dtype).float()
    expected, _, gradients = torchvision_results(case, grad)
    output, ours = triton_results(case, grad, dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close(output, expected, tolerance)
    for mine, theirs in zip(ours, gradients):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_close(mine, theirs, tolerance)
