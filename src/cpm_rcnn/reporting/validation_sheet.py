"""A picture of what a model finds in validation images, beside what is there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpm_rcnn.data.samplers import Sample
from cpm_rcnn.reporting.pictures import draw, save, sheet


def validation_sheet(
    detector: Callable[[Sequence[Tensor]], list[dict[str, Tensor]]],
    dataset: Dataset,
    class_names: Sequence[str],
    path: Path,
    count: int,
    device: torch.device,
) -> None:
    """Draw predicted and true boxes on ``count`` images spread evenly over ``dataset``, as one png.

    Args:
        detector: uint8 images to detections, as :class:`~cpm_rcnn.models.detector.CPMRCNN` in eval mode.
        dataset: a :class:`~cpm_rcnn.data.annotations.CocoDataset`.
        class_names: names of labels 1..C.
        path: the png to write.
        count: images at most.
        device: the detector's.
    """
    total = len(dataset)  # type: ignore[arg-type]
    rows = sorted({i * total // count for i in range(count)})
    pictures = []
    for row in rows:
        image, target = dataset[Sample(row, row)]
        with torch.inference_mode():
            detections: dict[str, Any] = detector([image.to(device)])[0]
        found = {key: value.cpu() for key, value in detections.items()}
        pictures.append(draw(image, found, class_names, truth=target))
    save(sheet(pictures, columns=4), path)
