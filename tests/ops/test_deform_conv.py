import pytest
import torch
import torchvision
from torch import nn

from cpm_rcnn.ops import DeformConv2d, deform_conv2d


def layer(stride=1, groups=2, dilation=1):
    torch.manual_seed(0)
    return nn.Conv2d(8, 6, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


@pytest.mark.parametrize(("stride", "groups", "dilation"), [(1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_layer_starts_as_the_convolution_it_replaces(stride, groups, dilation):
    conv, images = layer(stride, groups, dilation), torch.randn(2, 8, 9, 12)
    torch.testing.assert_close(DeformConv2d(conv)(images), conv(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_layer_samples_where_its_offsets_point_as_torchvision_does(stride):
    conv, images = layer(stride), torch.randn(2, 8, 9, 12)
    deformable = DeformConv2d(conv)
    nn.init.normal_(deformable.conv_offset.weight, std=0.3)
    nn.init.normal_(deformable.conv_offset.bias)
    expected = torchvision.ops.deform_conv2d(
        images, deformable.conv_offset(images), conv.weight, stride=stride, padding=1
    )
    torch.testing.assert_close(deformable(images), expected)
    assert not torch.allclose(deformable(images), conv(images), atol=1e-2)


def test_offsets_are_dy_dx_a_tap():
    conv, images = nn.Conv2d(1, 1, 3, padding=1, bias=False), torch.randn(1, 1, 9, 9)
    deformable = DeformConv2d(conv)
    deformable.conv_offset.bias.data[0::2] = 1.0  # every tap one pixel down
    deformable.conv_offset.bias.data[1::2] = 2.0  # and two to the right
    torch.testing.assert_close(deformable(images)[..., 1:-3, 1:-4], conv(images)[..., 2:-2, 3:-2])


def test_layer_keeps_the_weight_and_has_one_offset_group():
    conv = layer(stride=2)
    deformable = DeformConv2d(conv)
    assert deformable.weight is conv.weight
    assert deformable.conv_offset.weight.shape == (18, 8, 3, 3)
    assert set(dict(deformable.named_parameters())) == {"weight", "conv_offset.weight", "conv_offset.bias"}
    assert not any(parameter.any() for parameter in deformable.conv_offset.parameters())


def test_convolution_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias"):
        DeformConv2d(nn.Conv2d(3, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_in_is_dtype_out_and_gradients_follow(dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 4, 6, 6, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(1, 18, 6, 6, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 4, 3, 3, generator=generator).to(dtype).requires_grad_()
    output = deform_conv2d(images, offset, weight, padding=(1, 1))
    assert output.dtype == dtype
    exact = torchvision.ops.deform_conv2d(images.double(), offset.double(), weight.double(), padding=1)
    torch.testing.assert_close(output.double(), exact, rtol=1e-2, atol=1e-2 if dtype != torch.float64 else 1e-9)
    output.sum().backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in (images, offset, weight))


def test_mask_scales_the_taps():
    images, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
    offset = torch.zeros(1, 18, 6, 6)
    plain = deform_conv2d(images, offset, weight, padding=(1, 1))
    halved = deform_conv2d(images, offset, weight, padding=(1, 1), mask=torch.full((1, 9, 6, 6), 0.5))
    torch.testing.assert_close(halved, plain / 2)


def test_layer_trains_under_autocast():
    deformable, images = DeformConv2d(layer()), torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output = deformable(images)
    output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in deformable.parameters())


def test_channels_last_images_give_the_same():
    deformable, images = DeformConv2d(layer()), torch.randn(2, 8, 9, 12)
    nn.init.normal_(deformable.conv_offset.weight, std=0.3)
    expected = deformable(images)
    deformable.to(memory_format=torch.channels_last)
    torch.testing.assert_close(deformable(images.contiguous(memory_format=torch.channels_last)), expected)


def test_no_images_give_no_output():
    assert DeformConv2d(layer())(torch.zeros(0, 8, 6, 6)).shape == (0, 6, 6, 6)
