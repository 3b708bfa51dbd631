"""The detections that are evaluated, as arrays."""

from typing import NamedTuple

import numpy as np


class FoundDetections(NamedTuple):
    """Detections of all processes, without duplicate images.

    Attributes:
        evaluated: (I,) int64, the ids of the evaluated images in ascending order.
        image_ids: (N,) int64.
        category_ids: (N,) int64.
        boxes: (N, 4) float64 x, y, width, height in pixels.
        scores: (N,) float64.
        details: (N, 3) float64, in the order of :data:`~cpm_rcnn.models.structures.DETAILS`, NaN where the head has no
            such part; None if details were not requested.
    """

    evaluated: np.ndarray
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    details: np.ndarray | None = None
