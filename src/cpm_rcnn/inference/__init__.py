"""From a checkpoint and images to detections in the images' own pixels."""

from cpm_rcnn.inference.detector import Detector, ImageDetections
from cpm_rcnn.inference.load import load
from cpm_rcnn.inference.multi_scale import MultiScaleSettings

__all__ = ["Detector", "ImageDetections", "MultiScaleSettings", "load"]
