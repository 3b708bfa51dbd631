"""The function conv3x3, its operators for torch.compile, its layer, and where the kernel is used."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpm_rcnn.models.build import build_detector
from cpm_rcnn.ops import conv3x3 as module
from cpm_rcnn.ops.conv3x3 import Conv3x3, conv3x3, use_conv3x3


@pytest.fixture
def kernel_calls(monkeypatch):
    """A list with one entry per convolution that the kernel computed."""
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return operator(*arguments)

    operator = module.conv3x3_op
    monkeypatch.setattr(module, "conv3x3_op", record)
    return calls


def tensors(shape=(2, 64, 13, 14), out_channels=96, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (out_channels, shape[1], 3, 3), (out_channels,))
    x, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return [each.to(dtype).requires_grad_(requires_grad) for each in (x, weight / (9 * shape[1]) ** 0.5, bias)]


@pytest.mark.parametrize(
    ("shape", "out_channels", "dtype"),
    [((1, 64, 16, 16), 64, torch.float32), ((6, 96, 7, 7), 64, torch.bfloat16), ((29, 64, 3, 3), 64, torch.float32)],
)
def test_convolutions_of_enough_channels_and_outputs_use_the_kernel(
    shape, out_channels, dtype, kernel_calls, monkeypatch
):
    monkeypatch.setattr(module, "_HAS_AMX", False)
    arguments = tensors(shape, out_channels, dtype)
    torch.testing.assert_close(conv3x3(*arguments), F.conv2d(*arguments, padding=1))
    assert len(kernel_calls) == 1


@pytest.mark.parametrize(
    ("shape", "out_channels", "dtype"),
    [
        ((1, 64, 15, 17), 64, torch.float32),
        ((5, 64, 7, 7), 64, torch.float32),
        ((1, 32, 20, 20), 64, torch.float32),
        ((1, 64, 20, 20), 48, torch.float32),
        ((1, 72, 20, 20), 64, torch.float32),
        ((1, 64, 2, 200), 64, torch.float32),
        ((0, 64, 7, 7), 64, torch.float32),
        ((64, 20, 20), 64, torch.float32),
        ((1, 64, 20, 20), 64, torch.float64),
    ],
)
def test_all_other_convolutions_are_those_of_torch_bit_for_bit(shape, out_channels, dtype, kernel_calls):
    x = torch.randn(shape, dtype=dtype)
    layer = nn.Conv2d(shape[-3], out_channels, 3, padding=1, dtype=dtype)
    assert torch.equal(conv3x3(x, layer.weight, layer.bias), layer(x))
    assert not kernel_calls


def test_bfloat16_is_left_to_torch_on_processors_with_matrix_instructions(kernel_calls, monkeypatch):
    monkeypatch.setattr(module, "_HAS_AMX", True)
    arguments = tensors(dtype=torch.bfloat16)
    assert torch.equal(conv3x3(*arguments), F.conv2d(*arguments, padding=1))
    assert not kernel_calls


def test_other_devices_use_torch(kernel_calls):
    assert conv3x3(*(x.to("meta") for x in tensors())).shape == (2, 96, 13, 14)
    assert not kernel_calls


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, True)])
def test_gradients_are_those_of_torch(needed):
    found, expected = [], []
    for function, results in ((conv3x3, found), (lambda *x: F.conv2d(*x, padding=1), expected)):
        arguments = [x.requires_grad_(need) for x, need in zip(tensors(), needed)]
        function(*arguments).square().sum().backward()
        results += [x.grad for x in arguments]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 64, 13, 14), (1, 64, 3, 90)])
def test_second_and_third_derivatives_are_those_of_torch(shape):
    def derivatives(function):
        arguments = tensors(shape, requires_grad=True)
        results, outputs = [], [function(*arguments).sin()]
        for _ in range(3):
            outputs = torch.autograd.grad(sum(y.square().mean() for y in outputs), arguments, create_graph=True)
            results += outputs
        return results

    found, expected = derivatives(conv3x3), derivatives(lambda *x: F.conv2d(*x, padding=1))
    for value, right in zip(found, expected):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


@pytest.mark.parametrize("channels", [64, 48])
def test_under_autocast_dtypes_and_results_are_those_of_torch(channels):
    arguments = tensors((1, channels, 20, 20), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = conv3x3(*arguments), F.conv2d(*arguments, padding=1)
        double = conv3x3(*tensors(dtype=torch.float64))
    assert found.dtype is torch.bfloat16
    assert double.dtype is torch.float64
    # Torch rounds the weight to bfloat16; the kernel does not.
    torch.testing.assert_close(found, expected, rtol=1.6e-2, atol=3e-2)
    grads = [torch.autograd.grad(y.float().square().sum(), arguments) for y in (found, expected)]
    assert all(grad.dtype is torch.float32 for grad in grads[0])
    for grad, right in zip(*grads):
        torch.testing.assert_close(grad, right, rtol=2e-2, atol=1e-2 * right.abs().max().item())


def test_under_autocast_a_weight_is_not_rounded():
    x, weight, bias = tensors(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv3x3(x, weight, bias)
    exact = F.conv2d(x.bfloat16().double(), weight.double(), bias.double(), padding=1)
    (grad,) = torch.autograd.grad(found.sum(), weight)
    (exact_grad,) = torch.autograd.grad(exact.sum(), weight)
    assert (found != exact.bfloat16()).float().mean() < 0.01  # where two values are equally near
    torch.testing.assert_close(grad, exact_grad, rtol=1e-4, atol=1e-3)


def test_a_value_that_is_not_finite_makes_its_outputs_not_finite():
    x, weight, bias = tensors()
    x[1, 3, 5, 6] = torch.inf
    finite = conv3x3(x, weight, bias).isfinite()
    assert not finite[1, :, 4:7, 5:8].any()
    assert finite[0].all()


def test_the_operators_pass_opcheck():
    x, weight, bias = tensors(requires_grad=True)
    torch.library.opcheck(module.conv3x3_op, (x, weight, bias))
    torch.library.opcheck(module.conv3x3_op, (x, weight, None))
    torch.library.opcheck(module.conv3x3_grad_input_op, (torch.randn(2, 96, 13, 14), weight.detach()))
    torch.library.opcheck(module.conv3x3_grad_weight_op, (torch.randn(2, 96, 13, 14), x.detach(), torch.float32))
    half = x.detach().bfloat16().requires_grad_()
    torch.library.opcheck(module.conv3x3_op, (half, weight, bias))


def test_it_compiles_as_one_graph_for_all_sizes():
    compiled = torch.compile(conv3x3, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 64, 13, 14), (3, 64, 21, 11)):
        arguments = tensors(shape, requires_grad=True)
        found, expected = compiled(*arguments), conv3x3(*arguments)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(y.sum(), arguments) for y in (found, expected)]
        assert all(map(torch.equal, *grads))


def test_a_missing_kernel_warns_once_and_uses_torch(request):
    arguments = tensors(requires_grad=True)

    def results():
        output = conv3x3(*arguments)
        return output, *torch.autograd.grad(output.sum(), arguments)

    expected = results()
    request.getfixturevalue("no_compiler")
    with pytest.warns(UserWarning, match="CPU kernels are missing"):
        torch.testing.assert_close(results(), expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results()


def test_layers_are_replaced_where_the_kernel_may_be_used():
    convs = {
        "3x3": nn.Conv2d(64, 96, 3, padding=1),
        "without bias": nn.Conv2d(64, 96, 3, padding=1, bias=False),
        "few inputs": nn.Conv2d(48, 96, 3, padding=1),
        "few outputs": nn.Conv2d(64, 18, 3, padding=1),
        "grouped": nn.Conv2d(128, 128, 3, padding=1, groups=2),
        "strided": nn.Conv2d(64, 96, 3, 2, padding=1),
        "without padding": nn.Conv2d(64, 96, 3),
        "dilated": nn.Conv2d(64, 96, 3, padding=1, dilation=2),
        "1x1": nn.Conv2d(64, 96, 1),
        "reflecting": nn.Conv2d(64, 96, 3, padding=1, padding_mode="reflect"),
    }
    layers = nn.ModuleDict(convs)
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    x = torch.randn(1, 64, 20, 20)
    expected = layers["3x3"](x)
    use_conv3x3(layers)
    assert [name for name, layer in layers.items() if isinstance(layer, Conv3x3)] == ["3x3", "without bias"]
    assert layers.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    torch.testing.assert_close(layers["3x3"](x), expected, rtol=1e-4, atol=1e-4)


def test_a_full_model_uses_the_layer_and_a_small_one_does_not():
    def names(*arguments, **options):
        model = build_detector(*arguments, **options)
        return [name for name, layer in model.named_modules() if isinstance(layer, Conv3x3)]

    full = names("resnet18", 3)
    assert {name.split(".")[0] for name in full} == {"backbone", "rpn", "head"}
    # ResNet-18 has 13 of stride 1, the pyramid 4, the RPN one, and each of three grid stages all 8 but the first.
    assert len(full) == 13 + 4 + 1 + 21
    assert not names("tiny", 3, fpn_channels=48, point_channels=8, grid_convs=4, mlp_channels=256)
