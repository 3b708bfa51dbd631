"""The conditions under which torchvision tests its deformable convolution, for ours.

The shapes differ on every axis: 2 groups, 3 offset groups, a 3x2 kernel, and another stride, padding and dilation on
each side, so that no two sizes can be confused.
"""

import pytest
import torch

from cpm_rcnn.ops import DeformConv2d, deform_conv2d, deform_conv_op
from ops.naive_deform_conv import naive_deform_conv2d

GEOMETRY = {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)}
NAMES = ("input", "offset", "weight", "bias", "mask")


def arguments(batch, contiguous=True, dtype=torch.float64, masked=True):
    torch.manual_seed(0)
    height, width = 5, 4
    out_h, out_w = (height + 2 - 2 * 2 - 1) // 2 + 1, width - 1
    given = {
        "input": torch.rand(batch, 6, height, width, dtype=dtype),
        "offset": torch.randn(batch, 3 * 2 * 6, out_h, out_w, dtype=dtype),
        "weight": torch.randn(2, 3, 3, 2, dtype=dtype),
        "bias": torch.randn(2, dtype=dtype),
        "mask": torch.randn(batch, 3 * 6, out_h, out_w, dtype=dtype) if masked else None,
    }
    if not contiguous:
        orders = {"input": (0, 1, 3, 2), "offset": (1, 3, 0, 2), "weight": (3, 2, 0, 1), "mask": (2, 0, 3, 1)}
        for name, order in orders.items():
            if given[name] is not None:
                inverse = [order.index(i) for i in range(4)]
                given[name] = given[name].permute(order).contiguous().permute(inverse)
    return given


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("batch", [0, 33])
def test_forward_equals_the_definition(batch, contiguous, masked):
    given = arguments(batch, contiguous, masked=masked)
    assert batch == 0 or given["input"].is_contiguous() == contiguous
    expected = naive_deform_conv2d(**given, **GEOMETRY)
    torch.testing.assert_close(deform_conv2d(**given, **GEOMETRY), expected, rtol=1e-10, atol=1e-10)
    layer = DeformConv2d(6, 2, (3, 2), *GEOMETRY.values(), groups=2).to(torch.float64)
    with torch.no_grad():
        layer.weight.copy_(given["weight"])
        layer.bias.copy_(given["bias"])
    result = layer(given["input"], given["offset"], given["mask"])
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def check_gradients(given, wanted=NAMES):
    leaves = [None if given[name] is None else given[name].detach().requires_grad_(name in wanted) for name in NAMES]

    def function(*tensors):
        return deform_conv2d(**dict(zip(NAMES, tensors)), **GEOMETRY)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("batch", [0, 5])
def test_gradients_are_the_derivatives_of_the_output(batch, contiguous, masked):
    check_gradients(arguments(batch, contiguous, masked=masked))


@pytest.mark.parametrize("wanted", [*((name,) for name in NAMES), ("input", "weight"), ("offset", "mask")])
def test_gradients_are_correct_if_only_some_tensors_need_them(wanted):
    check_gradients(arguments(3), wanted)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("batch", [0, 3])
def test_the_operator_passes_opcheck_for_these_shapes(batch, contiguous, masked):
    given = arguments(batch, contiguous, masked=masked)
    tensors = [None if given[k] is None else given[k].requires_grad_() for k in ("input", "offset", "mask", "weight")]
    torch.library.opcheck(deform_conv_op.deform_conv2d_op, (*tensors, *map(list, GEOMETRY.values())))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 3])
def test_autocast_accepts_offsets_and_masks_of_any_dtype(batch, dtype, offset_dtype, autocast):
    exact = arguments(batch)
    given = {k: v.to(offset_dtype if k in ("offset", "mask") else dtype).requires_grad_() for k, v in exact.items()}
    expected = naive_deform_conv2d(**{k: v.detach().double() for k, v in given.items()}, **GEOMETRY)
    with torch.autocast("cpu", autocast):
        output = deform_conv2d(**given, **GEOMETRY)
    assert output.dtype is (torch.float64 if dtype is torch.float64 else autocast)
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.05)
    output.sum().backward()
    assert all(x.grad.dtype is x.dtype for x in given.values())


@pytest.mark.parametrize("name", ["input", "weight"])
def test_autocast_accepts_float32_weights_with_a_float64_input_and_the_reverse(name):
    given = arguments(2)
    given[name] = given[name].float()
    with torch.autocast("cpu", torch.bfloat16):
        assert deform_conv2d(**given, **GEOMETRY).dtype is (torch.bfloat16 if name == "input" else torch.float64)


def test_half_precision_offsets_need_autocast_if_the_input_is_float32():
    given = arguments(2, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"offset is torch\.float16 but input is torch\.float32"):
        deform_conv2d(**given | {"offset": given["offset"].half()}, **GEOMETRY)


@pytest.mark.parametrize("name", ["offset", "mask"])
def test_a_wrong_number_of_channels_raises_an_error(name):
    given = arguments(2)
    with pytest.raises(RuntimeError, match=rf"^deform_conv2d: {name}"):
        deform_conv2d(**given | {name: given[name][:, :2]}, **GEOMETRY)
