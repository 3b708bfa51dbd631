"""Deformable convolution in plain torch, written from its definition. Slow; autograd gives its gradients."""

import torch


def naive_deform_conv2d(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
    """The arguments and the result of ``torchvision.ops.deform_conv2d``, with pairs for the geometry."""
    images, channels = input.shape[:2]
    out_channels, group_in, kh, kw = weight.shape
    groups = channels // group_in
    out_h, out_w = offset.shape[2:]
    offset_groups = offset.shape[1] // (2 * kh * kw)
    offset = offset.reshape(images, offset_groups, kh, kw, 2, out_h, out_w)
    total = input.new_zeros(images, groups, out_channels // groups, out_h, out_w)
    for i in range(kh):
        for j in range(kw):
            row = torch.arange(out_h)[:, None] * stride[0] - padding[0] + i * dilation[0]
            column = torch.arange(out_w) * stride[1] - padding[1] + j * dilation[1]
            y, x = row + offset[:, :, i, j, 0], column + offset[:, :, i, j, 1]
            sampled = sum(
                ((1 - (y - corner_y).abs()) * (1 - (x - corner_x).abs()))[:, :, None]
                * at(input.unflatten(1, (offset_groups, channels // offset_groups)), corner_y.long(), corner_x.long())
                for corner_y in (y.detach().floor(), y.detach().floor() + 1)
                for corner_x in (x.detach().floor(), x.detach().floor() + 1)
            )
            if mask is not None:
                sampled = sampled * mask.reshape(images, offset_groups, kh, kw, out_h, out_w)[:, :, i, j][:, :, None]
            by_group = sampled.reshape(images, groups, group_in, out_h, out_w)
            total = total + torch.einsum(
                "ngchw,goc->ngohw", by_group, weight[:, :, i, j].unflatten(0, (groups, out_channels // groups))
            )
    output = total.flatten(1, 2)
    return output if bias is None else output + bias[:, None, None]


def at(input, y, x):
    """Pixels (N, offset_groups, C, H_out, W_out) of ``input`` (N, offset_groups, C, H, W), zero outside the image."""
    *batch, channels, height, width = input.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(2)[:, :, None]
    picked = input.flatten(3).gather(3, index.expand(-1, -1, channels, -1))
    return picked.reshape(*batch, channels, *y.shape[2:]) * inside[:, :, None]
