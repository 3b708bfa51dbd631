"""The function and its layers: what they share whatever kernel computes them."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

from cpm_rcnn import ops
from cpm_rcnn.errors import UserError
from cpm_rcnn.ops import DeformConv2d, DeformConv2dPack, deform_conv2d, deform_conv_op, use_deform_backend


def conv_like(stride=1, groups=2, dilation=1, bias=False):
    torch.manual_seed(0)
    return nn.Conv2d(8, 6, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=bias)


def pack_like(modulated=False, **arguments):
    """A layer whose offsets, and mask, are not those it starts with."""
    conv = conv_like(**arguments)
    shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
    layer = DeformConv2dPack(8, 6, 3, *shape, bias=conv.bias is not None, modulated=modulated)
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    nn.init.normal_(layer.conv_offset.bias)
    return layer


def tensors(dtype=torch.float32, masked=True, offset_groups=1):
    torch.manual_seed(0)
    return {
        "input": torch.randn(2, 8, 7, 9, dtype=dtype),
        "offset": torch.randn(2, 18 * offset_groups, 7, 9, dtype=dtype),
        "weight": torch.randn(6, 4, 3, 3, dtype=dtype),
        "bias": torch.randn(6, dtype=dtype),
        "stride": 1,
        "padding": 1,
        "dilation": 1,
        "mask": torch.rand(2, 9 * offset_groups, 7, 9, dtype=dtype) if masked else None,
    }


@pytest.mark.parametrize(
    ("stride", "groups", "dilation", "bias"), [(1, 1, 1, True), (2, 2, 1, False), (1, 2, 2, False)]
)
def test_layer_starts_as_the_convolution_it_replaces(stride, groups, dilation, bias):
    conv, images = conv_like(stride, groups, dilation, bias), torch.randn(2, 8, 9, 12)
    layer = DeformConv2dPack.from_conv(conv)
    torch.testing.assert_close(layer(images), conv(images), rtol=1e-5, atol=1e-5)
    assert layer.weight is conv.weight
    names = {"weight", "conv_offset.weight", "conv_offset.bias"} | ({"bias"} if bias else set())
    assert set(dict(layer.named_parameters())) == names
    assert layer.conv_offset.weight.shape == (18, 8, 3, 3)


def test_modulated_layer_starts_at_half_the_convolution_s_strength():
    layer, images = DeformConv2dPack(8, 6, 3, padding=1, bias=False, modulated=True), torch.randn(1, 8, 5, 6)
    expected = nn.functional.conv2d(images, layer.weight, padding=1) / 2
    torch.testing.assert_close(layer(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_layer_samples_where_its_offsets_point_as_torchvision_does(stride, modulated):
    layer, images = pack_like(modulated, stride=stride), torch.randn(2, 8, 9, 12)
    predicted = layer.conv_offset(images)
    mask = predicted[:, 18:].sigmoid() if modulated else None
    expected = torchvision.ops.deform_conv2d(
        images, predicted[:, :18], layer.weight, stride=stride, padding=1, mask=mask
    )
    torch.testing.assert_close(layer(images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        layer(images), nn.functional.conv2d(images, layer.weight, None, stride, 1, 1, 2), atol=1e-2
    )


def test_offsets_are_dy_dx_a_tap():
    conv, images = nn.Conv2d(1, 1, 3, padding=1, bias=False), torch.randn(1, 1, 9, 9)
    layer = DeformConv2dPack.from_conv(conv)
    layer.conv_offset.bias.data[0::2] = 1.0  # every tap one pixel down
    layer.conv_offset.bias.data[1::2] = 2.0  # and two to the right
    torch.testing.assert_close(layer(images)[..., 1:-3, 1:-4], conv(images)[..., 2:-2, 3:-2])


def test_layer_with_offsets_from_outside_is_torchvision_s():
    theirs = torchvision.ops.DeformConv2d(8, 6, 3, padding=1, groups=2)
    ours = DeformConv2d(8, 6, 3, padding=1, groups=2)
    ours.load_state_dict(theirs.state_dict())
    given = tensors()
    arguments = given["input"], given["offset"], given["mask"]
    torch.testing.assert_close(ours(*arguments), theirs(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["compiled", "torchvision", "without a kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_every_backend_gives_torchvision_s_values_and_gradients(backend, dtype, masked, monkeypatch):
    if backend == "without a kernel":
        monkeypatch.setattr(deform_conv_op, "_cpu_kernel", lambda: False)
    monkeypatch.setattr("cpm_rcnn.ops.deform_conv._backend", "torchvision" if backend == "torchvision" else "compiled")
    ours, theirs = (
        {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in tensors(dtype, masked).items()}
        for _ in "ab"
    )
    output, expected = deform_conv2d(**ours), torchvision.ops.deform_conv2d(**theirs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for result in (output, expected):
        (result * torch.arange(9.0, dtype=dtype)).sum().backward()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value.grad, theirs[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", [True, False])
def test_the_operator_passes_torch_s_own_checks(channels_last, masked, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(deform_conv_op, "_cpu_kernel", lambda: False)
    given = tensors(masked=masked)
    if channels_last:
        given["input"] = given["input"].contiguous(memory_format=torch.channels_last)
    leaves = [None if given[k] is None else given[k].requires_grad_() for k in ("input", "offset", "mask", "weight")]
    torch.library.opcheck(deform_conv_op.deform_conv2d_op, (*leaves, [1, 1], [1, 1], [1, 1]))


def test_the_layer_compiles_into_one_graph_and_exports():
    layer, images = pack_like(modulated=True), torch.randn(2, 8, 9, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), layer(images))
    ours, theirs = copy.deepcopy(layer), layer
    torch.compile(ours, fullgraph=True, backend="aot_eager")(images).sum().backward()
    theirs(images).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    exported = torch.export.export(layer, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.randn(3, 8, 9, 12)
    torch.testing.assert_close(exported.module()(more), layer(more))


def test_autocast_computes_and_trains_in_its_type():
    layer, images = pack_like(modulated=True, bias=True), torch.randn(2, 8, 9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    assert output.dtype is torch.bfloat16
    output.float().square().mean().backward()
    exact = copy.deepcopy(layer)
    exact.zero_grad()
    expected = exact(images)
    expected.square().mean().backward()
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    for ours, theirs in zip(layer.parameters(), exact.parameters()):
        assert ours.grad.dtype is torch.float32
        # A rounded offset may cross into the next cell, where its gradient is another.
        assert (ours.grad - theirs.grad).norm() < 0.4 * theirs.grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_offsets_and_masks_of_float32(dtype):
    exact = tensors(torch.float64)
    given = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in exact.items()}
    finer = given | {k: exact[k].float().requires_grad_() for k in ("offset", "mask")}
    expected = torchvision.ops.deform_conv2d(
        **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in finer.items()}
    )
    output = deform_conv2d(**finer)
    assert output.dtype is dtype
    assert (output.double() - expected).abs().max() < 0.02 * expected.abs().max()
    output.sum().backward()
    assert finer["offset"].grad.dtype is torch.float32


def test_output_has_the_memory_format_of_the_input():
    given = tensors()
    assert deform_conv2d(**given).is_contiguous()
    last = given | {"input": given["input"].contiguous(memory_format=torch.channels_last)}
    output = deform_conv2d(**last)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, deform_conv2d(**given))


WRONG = {
    "input of three dimensions": ({"input": torch.zeros(8, 7, 9)}, "input has 3 dimensions"),
    "whole numbers": ({"input": torch.zeros(2, 8, 7, 9, dtype=torch.int64)}, "floating point"),
    "two types": ({"weight": torch.zeros(6, 4, 3, 3, dtype=torch.float64)}, "weight is torch.float64"),
    "offsets of a wider type": ({"offset": torch.zeros(2, 18, 7, 9, dtype=torch.float64)}, "offset is torch.float64"),
    "channels that do not divide": ({"weight": torch.zeros(6, 3, 3, 3)}, "input has 8 channels"),
    "outputs that do not divide": ({"weight": torch.zeros(5, 4, 3, 3)}, "5 output channels"),
    "a bias too long": ({"bias": torch.zeros(7)}, "bias"),
    "offsets of no whole number of taps": ({"offset": torch.zeros(2, 17, 7, 9)}, "17 channels"),
    "no offsets": ({"offset": torch.zeros(2, 0, 7, 9)}, "0 channels"),
    "offsets of another size": ({"offset": torch.zeros(2, 18, 7, 8)}, "offset is (2, 18, 7, 8): must be (2, 18, 7, 9)"),
    "offsets of another batch": ({"offset": torch.zeros(1, 18, 7, 9)}, "must be (2, 18, 7, 9)"),
    "a mask of another size": ({"mask": torch.zeros(2, 9, 7, 8)}, "mask must be (2, 9, 7, 9)"),
    "no stride": ({"stride": 0}, "stride is (0, 0)"),
    "negative padding": ({"padding": -1}, "padding is (-1, -1)"),
    "a kernel larger than the image": ({"dilation": 9}, "output size would be"),
    "an empty kernel": ({"weight": torch.zeros(6, 4, 0, 3)}, "must not be empty"),
    "two devices": ({"weight": torch.zeros(6, 4, 3, 3, device="meta")}, "weight is on meta, input on cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_a_runtime_error_that_names_it(case):
    change, says = WRONG[case]
    with pytest.raises(RuntimeError, match=r"^deform_conv2d: ") as caught:
        deform_conv2d(**tensors() | change)
    assert says in str(caught.value)


def test_no_images_give_no_output_and_gradients_of_zero():
    given = tensors()
    empty = given | {k: given[k][:0].requires_grad_() for k in ("input", "offset", "mask")}
    empty["weight"].requires_grad_()
    output = deform_conv2d(**empty)
    assert output.shape == (0, 6, 7, 9)
    output.sum().backward()
    assert empty["input"].grad.shape == (0, 8, 7, 9)
    assert not empty["weight"].grad.any()


def test_a_missing_kernel_is_said_once_and_torchvision_takes_its_place(monkeypatch):
    monkeypatch.setattr(deform_conv_op._KERNELS, "__path__", [])
    deform_conv_op._cpu_kernel.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"not built.*--no-build-isolation"):
            first = deform_conv2d(**tensors())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(deform_conv2d(**tensors()), first)
    finally:
        deform_conv_op._cpu_kernel.cache_clear()
    torch.testing.assert_close(first, torchvision.ops.deform_conv2d(**tensors()))


def test_backend_is_chosen_by_name():
    try:
        use_deform_backend("torchvision")
        given = tensors(masked=False)
        assert torch.equal(deform_conv2d(**given), torchvision.ops.deform_conv2d(**given))
    finally:
        use_deform_backend("compiled")
    with pytest.raises(UserError, match=r"ops\.deform=fast: must be one of compiled, torchvision"):
        use_deform_backend("fast")
    assert "use_deform_backend" in ops.__all__
