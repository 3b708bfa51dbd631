"""Sampling operators; nothing of detection."""

from cpm_rcnn.ops.deform_conv import DeformConv2d, DeformConv2dPack, deform_conv2d, use_deform_backend

__all__ = ["DeformConv2d", "DeformConv2dPack", "deform_conv2d", "use_deform_backend"]
