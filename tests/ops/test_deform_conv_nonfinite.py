"""What NaN and infinity in offsets, masks and inputs change, on every path. docs/deform_conv.md describes it."""

import pytest
import torch

from cpm_rcnn.ops import deform_conv2d, deform_conv_op
from cpm_rcnn.ops import deform_conv_backends as backends

GEOMETRY = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
PATHS = {
    "compiled kernel, float32": torch.float32,
    "compiled kernel, float64": torch.float64,
    "compiled kernel, bfloat16": torch.bfloat16,
    "no compiler": torch.float32,
    "ops.deform=torchvision": torch.float64,
    "float16": torch.float16,
    "bfloat16 with float32 offsets": torch.bfloat16,
    "Triton kernel": torch.float32,
}
FAR = 1000.0


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "no compiler":
        monkeypatch.setattr(backends, "load_cpu_kernel", lambda: False)
    elif request.param in ("ops.deform=torchvision", "bfloat16 with float32 offsets"):
        monkeypatch.setattr(backends, "_backend", "torchvision")
    elif request.param == "Triton kernel":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton's interpreter is only used on a machine without a GPU")
        kernel = backends.load_triton_kernel()
        monkeypatch.setattr(
            deform_conv_op, "select_backend", lambda *_: backends.Backend(kernel.forward, kernel.backward)
        )
    else:
        assert backends.load_cpu_kernel()
    return request.param


def make(path, groups, offset_groups, channels=8, masked=True):
    torch.manual_seed(0)
    dtype = PATHS[path]
    finer = torch.float32 if path == "bfloat16 with float32 offsets" else dtype
    return {
        "input": torch.randn(2, channels, 5, 6).to(dtype),
        "offset": torch.randn(2, 18 * offset_groups, 5, 6).to(finer),
        "mask": torch.rand(2, 9 * offset_groups, 5, 6).to(finer) if masked else None,
        "weight": torch.randn(12, channels // groups, 3, 3).to(dtype),
    }


def results(given):
    """The output for these tensors, and the gradient of its sum for each of them."""
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if v is not None}
    output = deform_conv2d(**leaves, **GEOMETRY)
    output.backward(torch.ones_like(output))
    return output.detach(), {k: v.grad for k, v in leaves.items()}


def lost_at(like, places):
    """True at these places of a tensor, and False elsewhere."""
    lost = torch.zeros(like.shape, dtype=torch.bool)
    for place in places:
        lost[place] = True
    return lost


@pytest.mark.parametrize(("groups", "offset_groups", "masked"), [(1, 1, False), (4, 2, True), (2, 4, True)])
def test_a_non_finite_offset_makes_what_depends_on_its_sample_nan(path, groups, offset_groups, masked):
    given = make(path, groups, offset_groups, masked=masked)
    last = offset_groups - 1
    # (value, image, offset group, tap, 0 for dy and 1 for dx, row, column)
    samples = [(torch.nan, 0, 0, 4, 0, 2, 3), (torch.inf, 1, last, 8, 1, 0, 0), (-torch.inf, 1, 0, 0, 0, 4, 5)]
    outside = given | {"offset": given["offset"].clone()}
    lost = {k: torch.zeros(v.shape, dtype=torch.bool) for k, v in given.items() if v is not None}
    lost_output = torch.zeros(2, 12, 5, 6, dtype=torch.bool)
    per_offset_group, group_in = 8 // offset_groups, 8 // groups
    for value, n, offset_group, tap, axis, row, column in samples:
        pair = 2 * (9 * offset_group + tap)
        given["offset"][n, pair + axis, row, column] = value
        outside["offset"][n, pair : pair + 2, row, column] = FAR
        lost["offset"][n, pair : pair + 2, row, column] = True
        if masked:
            lost["mask"][n, 9 * offset_group + tap, row, column] = True
        for channel in range(offset_group * per_offset_group, (offset_group + 1) * per_offset_group):
            outputs = slice(channel // group_in * (12 // groups), (channel // group_in + 1) * (12 // groups))
            lost_output[n, outputs, row, column] = True
            lost["weight"][outputs, channel % group_in, tap // 3, tap % 3] = True
    output, gradients = results(given)
    expected, expected_gradients = results(outside)
    assert torch.equal(output.isnan(), lost_output)
    assert torch.equal(output[~lost_output], expected[~lost_output])
    for name, gradient in gradients.items():
        # The input's gradient omits the sample.
        assert torch.equal(gradient.isnan(), lost[name]), name
        torch.testing.assert_close(gradient[~lost[name]], expected_gradients[name][~lost[name]])


def test_no_finite_offset_at_all_gives_nan_everywhere_but_in_the_gradient_of_the_input(path):
    given = make(path, 2, 1)
    given["offset"][:] = torch.nan
    output, gradients = results(given)
    assert output.isnan().all()
    assert not gradients["input"].any()
    assert all(gradients[name].isnan().all() for name in ("offset", "mask", "weight"))


def test_a_huge_finite_offset_samples_zeros(path):
    given = make(path, 2, 1)
    far = given | {"offset": given["offset"].clone()}
    given["offset"][:, 4] = torch.finfo(given["offset"].dtype).max
    given["offset"][:, 7] = torch.finfo(given["offset"].dtype).min
    far["offset"][:, [4, 7]] = FAR
    (output, gradients), (expected, expected_gradients) = results(given), results(far)
    torch.testing.assert_close(output, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])


@pytest.mark.parametrize(("inside", "outside"), [(torch.nan, torch.inf), (-torch.inf, torch.nan)])
def test_a_non_finite_mask_factor_makes_the_pixel_and_its_offset_gradients_non_finite(path, inside, outside):
    given = make(path, 1, 1)
    given["mask"][0, 4, 2, 3] = inside
    given["mask"][1, 8, 0, 0] = outside  # its sample is outside the image
    given["offset"][1, 16:18, 0, 0] = FAR
    output, gradients = results(given)
    assert torch.equal(~output.isfinite(), lost_at(output, [(0, slice(None), 2, 3), (1, slice(None), 0, 0)]))
    pairs = [(0, slice(8, 10), 2, 3), (1, slice(16, 18), 0, 0)]
    assert torch.equal(~gradients["offset"].isfinite(), lost_at(gradients["offset"], pairs))
    assert gradients["mask"].isfinite().all()
    lost = lost_at(gradients["weight"], [(slice(None), slice(None), 1, 1), (slice(None), slice(None), 2, 2)])
    assert torch.equal(~gradients["weight"].isfinite(), lost)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_non_finite_input_makes_the_pixels_that_sample_it_non_finite(path, value):
    given = make(path, 1, 1, masked=False)
    # Multiples of 1/4 that are not integers: float16 and bfloat16 represent the positions exactly.
    given["offset"] = (torch.randint(-4, 4, given["offset"].shape) + 0.25).to(given["offset"].dtype)
    given["input"][1, 3, 2, 4] = value
    output, gradients = results(given)
    offset = given["offset"].float().unflatten(1, (9, 2))
    near = torch.zeros(2, 9, 5, 6, dtype=torch.bool)
    for tap in range(9):
        y = torch.arange(5)[:, None] - 1 + tap // 3 + offset[1, tap, 0]
        x = torch.arange(6) - 1 + tap % 3 + offset[1, tap, 1]
        near[1, tap] = ((y - 2).abs() < 1) & ((x - 4).abs() < 1)
    assert near.any()
    assert torch.equal(~output.isfinite(), near.any(1, keepdim=True).expand(-1, 12, -1, -1))
    assert torch.equal(~gradients["offset"].isfinite(), near.repeat_interleave(2, 1))
    # The input's gradient does not depend on the input.
    assert gradients["input"].isfinite().all()


def test_infinite_and_nan_values_are_ignored_where_no_sample_reads_them(path):
    given = make(path, 2, 1)
    given["input"][:] = torch.nan
    given["offset"][:] = FAR
    output, gradients = results(given)
    assert not output.any()
    assert not any(gradients[name].any() for name in ("input", "offset", "mask", "weight"))
