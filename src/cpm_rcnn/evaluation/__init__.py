"""Metrics: how good detections are, measured against annotations."""
