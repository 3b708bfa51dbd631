"""Backbones, which compute the feature maps C2..C5 of images (docs/method.md section 2)."""

from cpm_rcnn.models.backbones.build import build_body
from cpm_rcnn.models.backbones.input_format import CAFFE, RGB, InputFormat
from cpm_rcnn.models.backbones.settings import BackboneSettings

__all__ = ["CAFFE", "RGB", "BackboneSettings", "InputFormat", "build_body"]
