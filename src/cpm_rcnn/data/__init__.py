"""From annotation and image files to batches of uint8 images and targets. It does not depend on models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpm_rcnn.data.annotations import CocoAnnotations
    from cpm_rcnn.data.datamodule import CocoDataModule, ShapesDataModule
    from cpm_rcnn.data.dataset import CocoDataset
    from cpm_rcnn.data.images import ImageSource
    from cpm_rcnn.data.settings import DataSettings
    from cpm_rcnn.data.splits import DataSplits

__all__ = [
    "CocoAnnotations",
    "CocoDataModule",
    "CocoDataset",
    "DataSettings",
    "DataSplits",
    "ImageSource",
    "ShapesDataModule",
]

_MODULES = {
    "CocoAnnotations": "annotations",
    "CocoDataModule": "datamodule",
    "CocoDataset": "dataset",
    "DataSettings": "settings",
    "DataSplits": "splits",
    "ImageSource": "images",
    "ShapesDataModule": "datamodule",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the settings can be checked without torch.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
