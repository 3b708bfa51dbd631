"""An evaluated split: the input of the analysis."""

from dataclasses import dataclass, replace

import numpy as np

from cpm_rcnn.evaluation.engines import EvaluationData


@dataclass(frozen=True, eq=False)
class EvaluatedSplit:
    """The objects and detections of the evaluated images, with the names that a reader needs.

    Attributes:
        data: objects and detections; its images are 1..I and its classes 1..K.
        image_ids: (I,) int64, COCO ids.
        file_names: (I,) str.
        sizes: (I, 2) int64, width and height in pixels.
        class_ids: K category ids in ascending order.
        class_names: K names.
        details: (N, 3) float64, how the score of each detection was computed, in the order of
            :data:`~cpm_rcnn.models.structures.DETAILS`, NaN where the head has no such part; None if not known.
    """

    data: EvaluationData
    image_ids: np.ndarray
    file_names: np.ndarray
    sizes: np.ndarray
    class_ids: list[int]
    class_names: list[str]
    details: np.ndarray | None = None

    def detections(self, kept: np.ndarray) -> "EvaluatedSplit":
        """The same split with the detections at ``kept``, a bool mask (N,) or int64 rows."""
        data = self.data
        chosen = replace(
            data,
            found_images=data.found_images[kept],
            found_categories=data.found_categories[kept],
            found_boxes=data.found_boxes[kept],
            found_scores=data.found_scores[kept],
        )
        return replace(self, data=chosen, details=None if self.details is None else self.details[kept])
