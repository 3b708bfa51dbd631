"""Exported detectors: files that run without this package, in torch or in onnxruntime (docs/export.md)."""

