"""Detectors as files that run without this package, in torch or in onnxruntime (docs/export.md)."""

from cpm_rcnn.inference.export.files import FORMATS, export

__all__ = ["FORMATS", "export"]
