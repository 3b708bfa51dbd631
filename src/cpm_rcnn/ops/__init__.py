"""Deformable convolution: the function, its layers, and the choice of the implementation."""

from cpm_rcnn.ops.deform_conv import DeformConv2d, DeformConv2dPack, deform_conv2d
from cpm_rcnn.ops.deform_conv_backends import use_deform_backend

__all__ = ["DeformConv2d", "DeformConv2dPack", "deform_conv2d", "use_deform_backend"]
