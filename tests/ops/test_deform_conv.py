"""The function, its layers and the choice of backend: behavior that does not depend on the kernel."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from cpm_rcnn import ops
from cpm_rcnn.errors import UserError
from cpm_rcnn.ops import DeformConv2d, DeformConv2dPack, deform_conv2d, deform_conv_op, use_deform_backend
from cpm_rcnn.ops import deform_conv_backends as backends


def conv_like(stride=1, groups=2, dilation=1, bias=False):
    torch.manual_seed(0)
    return nn.Conv2d(8, 6, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=bias)


def pack_like(modulated=False, **arguments):
    """A layer with random offset (and mask) predictions instead of the initial zeros."""
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


def test_modulated_layer_starts_at_half_the_output_of_the_convolution():
    layer, images = DeformConv2dPack(8, 6, 3, padding=1, bias=False, modulated=True), torch.randn(1, 8, 5, 6)
    expected = nn.functional.conv2d(images, layer.weight, padding=1) / 2
    torch.testing.assert_close(layer(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_layer_gives_torchvision_results_for_its_predicted_offsets(stride, modulated):
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


def test_offsets_are_one_dy_dx_pair_per_tap():
    conv, images = nn.Conv2d(1, 1, 3, padding=1, bias=False), torch.randn(1, 1, 9, 9)
    layer = DeformConv2dPack.from_conv(conv)
    layer.conv_offset.bias.data[0::2] = 1.0  # moves every tap one pixel down
    layer.conv_offset.bias.data[1::2] = 2.0  # and two pixels to the right
    torch.testing.assert_close(layer(images)[..., 1:-3, 1:-4], conv(images)[..., 2:-2, 3:-2])


def test_layer_with_given_offsets_equals_the_torchvision_layer():
    theirs = torchvision.ops.DeformConv2d(8, 6, 3, padding=1, groups=2)
    ours = DeformConv2d(8, 6, 3, padding=1, groups=2)
    ours.load_state_dict(theirs.state_dict())
    given = tensors()
    arguments = given["input"], given["offset"], given["mask"]
    torch.testing.assert_close(ours(*arguments), theirs(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["compiled", "torchvision", "no compiled kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_every_backend_gives_torchvision_values_and_gradients(backend, dtype, masked, monkeypatch):
    if backend == "no compiled kernel":
        monkeypatch.setattr(backends, "load_cpu_kernel", lambda: False)
    monkeypatch.setattr(backends, "_backend", "torchvision" if backend == "torchvision" else "compiled")
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
def test_the_operator_passes_opcheck(channels_last, masked, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(backends, "load_cpu_kernel", lambda: False)
    given = tensors(masked=masked)
    if channels_last:
        given["input"] = given["input"].contiguous(memory_format=torch.channels_last)
    leaves = [None if given[k] is None else given[k].requires_grad_() for k in ("input", "offset", "mask", "weight")]
    torch.library.opcheck(deform_conv_op.deform_conv2d_op, (*leaves, [1, 1], [1, 1], [1, 1]))


def test_the_layer_compiles_to_one_graph_and_exports():
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


def test_autocast_computes_and_trains_in_the_autocast_dtype():
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
        # Rounding an offset may move its sample to the next pixel cell, where the gradient differs.
        assert (ours.grad - theirs.grad).norm() < 0.4 * theirs.grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accepts_float32_offsets_and_masks(dtype):
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


def test_meta_tensors_give_the_output_shape_and_gradients_of_torchvision():
    given = {k: v.to("meta").requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in tensors().items()}
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, expected = deform_conv2d(**given), torchvision.ops.deform_conv2d(**given)
        assert (output.shape, output.dtype, output.device) == (expected.shape, expected.dtype, expected.device)
    grads = torch.autograd.grad(output.sum(), [v for v in given.values() if isinstance(v, torch.Tensor)])
    assert [g.shape for g in grads] == [v.shape for v in given.values() if isinstance(v, torch.Tensor)]
    layer = pack_like().to("meta")
    assert layer(torch.empty(2, 8, 9, 12, device="meta")).shape == (2, 6, 9, 12)


@pytest.mark.parametrize("kind", [np.int64, np.int32, lambda n: (n, n), lambda n: [np.int64(n)] * 2])
def test_strides_padding_and_dilation_may_be_any_integers_or_pairs(kind):
    given = tensors()
    shape = {k: kind(1) for k in ("stride", "padding", "dilation")}
    assert torch.equal(deform_conv2d(**given | shape), deform_conv2d(**given))


@pytest.mark.parametrize("backend", ["compiled", "torchvision"])
@pytest.mark.parametrize("size", [(0, 6), (6, 0), (0, 0)])
@pytest.mark.parametrize("images", [0, 2])
def test_an_input_without_rows_or_columns_gives_the_bias_if_it_is_padded(size, images, backend, monkeypatch):
    monkeypatch.setattr(backends, "_backend", backend)
    height, width = (side + 2 for side in size)  # the output is as large as that of a 3x3 kernel with padding 2
    given = tensors() | {
        "input": torch.randn(images, 8, *size),
        "offset": torch.randn(images, 18, height, width),
        "mask": torch.rand(images, 9, height, width),
        "padding": 2,
    }
    leaves = [v.requires_grad_() for v in given.values() if isinstance(v, torch.Tensor)]
    output = deform_conv2d(**given)
    assert torch.equal(output, torchvision.ops.deform_conv2d(**given))
    if 0 in size:
        assert torch.equal(output, given["bias"][:, None, None].expand(images, 6, height, width))
    grads = torch.autograd.grad(output.sum(), leaves)
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    assert not any(g.any() for g, x in zip(grads, leaves) if x is not given["bias"])


def test_output_has_the_memory_format_of_the_input():
    given = tensors()
    assert deform_conv2d(**given).is_contiguous()
    last = given | {"input": given["input"].contiguous(memory_format=torch.channels_last)}
    output = deform_conv2d(**last)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, deform_conv2d(**given))


INVALID = {
    "input has three dimensions": ({"input": torch.zeros(8, 7, 9)}, "input has 3 dimensions"),
    "integer input": ({"input": torch.zeros(2, 8, 7, 9, dtype=torch.int64)}, "must be a floating-point dtype"),
    "weight has another dtype": ({"weight": torch.zeros(6, 4, 3, 3, dtype=torch.float64)}, "weight is torch.float64"),
    "offset has a wider dtype": ({"offset": torch.zeros(2, 18, 7, 9, dtype=torch.float64)}, "offset is torch.float64"),
    "input channels do not divide by the weight's": ({"weight": torch.zeros(6, 3, 3, 3)}, "input has 8 channels"),
    "output channels do not divide by the groups": ({"weight": torch.zeros(5, 4, 3, 3)}, "5 output channels"),
    "bias is too long": ({"bias": torch.zeros(7)}, "bias"),
    "offset channels do not divide by the taps": ({"offset": torch.zeros(2, 17, 7, 9)}, "17 channels"),
    "offset has no channels": ({"offset": torch.zeros(2, 0, 7, 9)}, "0 channels"),
    "offset has another size": ({"offset": torch.zeros(2, 18, 7, 8)}, "offset is (2, 18, 7, 8): must be (2, 18, 7, 9)"),
    "offset has another batch size": ({"offset": torch.zeros(1, 18, 7, 9)}, "must be (2, 18, 7, 9)"),
    "mask has another size": ({"mask": torch.zeros(2, 9, 7, 8)}, "mask must be (2, 9, 7, 9)"),
    "stride is zero": ({"stride": 0}, "stride is (0, 0)"),
    "stride has three numbers": ({"stride": (1, 1, 1)}, "(1, 1, 1) must be one number or two"),
    "padding is negative": ({"padding": -1}, "padding is (-1, -1)"),
    "kernel is larger than the image": ({"dilation": 9}, "output size would be"),
    "kernel is empty": ({"weight": torch.zeros(6, 4, 0, 3)}, "must not be empty"),
    "weight is on another device": (
        {"weight": torch.zeros(6, 4, 3, 3, device="meta")},
        "weight is on meta but input is on cpu",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments_raise_a_runtime_error_that_names_them(case):
    change, message = INVALID[case]
    with pytest.raises(RuntimeError, match=r"^deform_conv2d: ") as caught:
        deform_conv2d(**tensors() | change)
    assert message in str(caught.value)


def test_an_empty_batch_gives_an_empty_output_and_zero_gradients():
    given = tensors()
    empty = given | {k: given[k][:0].requires_grad_() for k in ("input", "offset", "mask")}
    empty["weight"].requires_grad_()
    output = deform_conv2d(**empty)
    assert output.shape == (0, 6, 7, 9)
    output.sum().backward()
    assert empty["input"].grad.shape == (0, 8, 7, 9)
    assert not empty["weight"].grad.any()


def test_a_missing_kernel_warns_once_and_uses_torchvision(no_compiler):
    with pytest.warns(UserWarning, match="CPU kernels are missing"):
        first = deform_conv2d(**tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(deform_conv2d(**tensors()), first)
    torch.testing.assert_close(first, torchvision.ops.deform_conv2d(**tensors()))


def results(arguments):
    """The output, and the gradients of all tensors."""
    leaves = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    output = deform_conv2d(**leaves)
    grads = torch.autograd.grad(output.float().square().sum(), [v for v in leaves.values() if torch.is_tensor(v)])
    return output.detach(), *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_torchvision_backend_and_a_missing_kernel_use_the_same_fallback(dtype, masked, monkeypatch):
    given = tensors(dtype, masked)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_backend", "torchvision")
        chosen = results(given)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "load_cpu_kernel", lambda: False)
        missing = results(given)
    assert all(torch.equal(x, y) for x, y in zip(chosen, missing))


def test_only_the_gradients_that_are_needed_are_returned_by_the_fallback(monkeypatch):
    monkeypatch.setattr(backends, "_backend", "torchvision")
    given = tensors(masked=False)
    arguments = [given[k] for k in ("input", "offset", "mask", "weight")]
    geometry = ([1, 1], [1, 1], [1, 1])
    grads = torch.ops.cpm_rcnn.deform_conv2d_backward(
        torch.ones(2, 6, 7, 9), *arguments, *geometry, [False, True, True, False]
    )
    assert [grad.numel() > 0 for grad in grads] == [False, True, False, False]


def test_each_device_and_dtype_selects_the_backend_that_supports_it(monkeypatch):
    def selected(device, dtype, offset_dtype=None):
        input, offset = (torch.empty(1, channels, 4, 4, device="meta", dtype=dtype) for channels in (8, 18))
        offset = offset.to(offset_dtype or dtype)
        weight = torch.empty(8, 8, 3, 3, device="meta", dtype=dtype)
        # Replaces a tensor on a device that this machine may not have.
        replacement = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=input.shape)
        return backends.select_backend(replacement, offset, None, weight)

    triton = SimpleNamespace(
        supports=lambda input, *_: input.dtype is not torch.float64, forward=lambda: None, backward=lambda: None
    )
    monkeypatch.setattr(backends, "load_triton_kernel", lambda: triton)
    monkeypatch.setattr(backends, "load_cpu_kernel", lambda: True)
    monkeypatch.setattr(torch.ops, "cpm_rcnn_cpu", SimpleNamespace(deform_conv2d=1, deform_conv2d_backward=2))
    assert selected("cpu", torch.float32) == (1, 2)
    assert selected("cpu", torch.float16) is backends.TORCHVISION
    assert selected("cpu", torch.bfloat16, torch.float32) is backends.TORCHVISION
    assert selected("cuda", torch.float16) == (triton.forward, triton.backward)
    assert selected("cuda", torch.float64) is backends.TORCHVISION
    assert selected("mps", torch.float32) is backends.TORCHVISION
    monkeypatch.setattr(backends, "_backend", "torchvision")
    assert selected("cpu", torch.float32) is backends.TORCHVISION
    assert selected("cuda", torch.float16) is backends.TORCHVISION


def test_the_backend_is_set_by_name():
    try:
        use_deform_backend("torchvision")
        given = tensors(masked=False)
        assert torch.equal(deform_conv2d(**given), torchvision.ops.deform_conv2d(**given))
    finally:
        use_deform_backend("compiled")
    with pytest.raises(UserError, match=r"ops\.deform=fast: must be one of compiled, torchvision"):
        use_deform_backend("fast")
    assert "use_deform_backend" in ops.__all__
