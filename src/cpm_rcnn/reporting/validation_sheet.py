"""One picture of a model's detections in validation images, with the ground truth."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from cpm_rcnn.data.transforms import network_size, resize
from cpm_rcnn.inference.detector import Detector
from cpm_rcnn.reporting.pictures import draw, save, sheet

SHEET = "validation.png"  # its name in a run's folder
# Larger images are drawn smaller; only a detector that cuts images into tiles gets such images.
_MAX_SIDE = 1333


def validation_sheet(detector: Detector, dataset: Dataset, path: Path, count: int) -> None:
    """Draw detections and ground-truth boxes on images spread evenly over a data set, as one picture.

    Args:
        detector: the detector whose detections are drawn.
        dataset: the :class:`~cpm_rcnn.data.CocoDataset` of the validation split.
        path: the png to write.
        count: maximum number of images.
    """
    total = len(dataset)  # type: ignore[arg-type]
    pictures = []
    detector.model.eval()
    for row in sorted({i * total // count for i in range(count)}):
        image, target = dataset[row]
        with torch.inference_mode():
            (found,) = detector.detect_resized([image.to(detector.device)], [image.shape[-2:]])
        detections = {name: value.cpu() for name, value in found.items()}
        if max(image.shape) > _MAX_SIDE:
            size = network_size((image.shape[-2], image.shape[-1]), _MAX_SIDE, _MAX_SIDE)
            both = detections["boxes"], target["boxes"]
            image, boxes = resize(image, torch.cat(both), size)
            detections["boxes"], target["boxes"] = boxes.split([len(each) for each in both])
        pictures.append(draw(image, detections, detector.class_names, ground_truth=target))
    save(sheet(pictures, columns=4), path)
