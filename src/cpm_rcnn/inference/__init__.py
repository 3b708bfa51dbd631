"""Detection in images of any size with a trained model: :func:`load` and :class:`Detector`."""

from cpm_rcnn.inference.detector import Detector
from cpm_rcnn.inference.image_detections import ImageDetections
from cpm_rcnn.inference.load import load
from cpm_rcnn.inference.multi_scale import MultiScaleSettings

__all__ = ["Detector", "ImageDetections", "MultiScaleSettings", "load"]
