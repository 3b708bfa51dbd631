"""From annotation and image files to batches of uint8 images and targets. It does not depend on models."""

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.datamodule import CocoDataModule, ShapesDataModule
from cpm_rcnn.data.dataset import CocoDataset
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.settings import DataSettings

__all__ = ["CocoAnnotations", "CocoDataModule", "CocoDataset", "DataSettings", "ImageSource", "ShapesDataModule"]
