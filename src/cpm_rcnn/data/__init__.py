"""Files to uint8 images and targets; nothing of models."""

from cpm_rcnn.data.annotations import CocoAnnotations, CocoDataset
from cpm_rcnn.data.datamodule import CocoDataModule, ShapesDataModule
from cpm_rcnn.data.images import ImageSource

__all__ = ["CocoAnnotations", "CocoDataModule", "CocoDataset", "ImageSource", "ShapesDataModule"]
