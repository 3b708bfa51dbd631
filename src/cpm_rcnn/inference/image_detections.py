"""The detections in one image, and their forms in other programs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.errors import UserError
from cpm_rcnn.models.structures import DETAILS

COLUMNS = ("boxes", "scores", "labels", *DETAILS)
# Names of the details in results in COCO's format.
RESULT_KEYS = {"class_scores": "class_score", "predicted_iou": "predicted_iou", "rsm_probability": "rsm_probability"}


@dataclass(frozen=True)
class ImageDetections:
    """The detections in one image, best score first.

    Attributes:
        boxes: (N, 4) float32, xyxy pixels of the image as it was given, in the detector's box convention. They may
            extend beyond the image.
        scores: (N,) float32 in 0..1.
        labels: (N,) int64 in 1..C.
        names: N class names.
        category_ids: N ids of these classes in the annotations.
        convention: the box convention of ``boxes``.
        class_scores: (N,) float32 in 0..1, the probability of the label before ISM and RSM. This and the next two are
            None unless details are requested and the head has this part.
        predicted_iou: (N,) float32 in 0..1, the IoU that ISM predicts.
        rsm_probability: (N,) float32 in 0..1, RSM's probability of the label.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]
    category_ids: list[int]
    convention: BoxConvention
    class_scores: Tensor | None = None
    predicted_iou: Tensor | None = None
    rsm_probability: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def to_dict(self) -> dict[str, Tensor]:
        """``boxes``, ``scores``, ``labels`` and the details that are not None, as the model returns them."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        return {name: column for name, column in columns.items() if column is not None}

    def above(self, thresholds: float | Sequence[float]) -> "ImageDetections":
        """Those detections whose score is at least a threshold.

        Args:
            thresholds: one for all classes, or one for each class 1..C.
        """
        limits = self.scores.new_tensor(thresholds)
        kept = self.scores >= (limits[self.labels - 1] if limits.ndim else limits)
        rows = kept.nonzero().squeeze(1).tolist()
        names, ids = ([column[row] for row in rows] for column in (self.names, self.category_ids))
        columns: dict[str, Any] = {name: column[kept] for name, column in self.to_dict().items()}
        return replace(self, **columns, names=names, category_ids=ids)

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """The detections in COCO's format of results, one dict each.

        Args:
            image_id: the id of the image.

        Returns:
            ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels) and ``score``, and for details
            ``class_score``, ``predicted_iou`` and ``rsm_probability``. All are plain values.
        """
        boxes = self.convention.to_xywh(self.boxes).tolist()
        rows = [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(self.category_ids, boxes, self.scores.tolist())
        ]
        for name, key in RESULT_KEYS.items():
            if (column := getattr(self, name)) is not None:
                for row, value in zip(rows, column.tolist()):
                    row[key] = value
        return rows

    def to_supervision(self) -> Any:
        """The detections as ``supervision.Detections``.

        Returns:
            ``xyxy`` are the edges of the boxes in pixels, ``class_id`` counts the classes from 0, and
            ``data["class_name"]`` has their names.

        Raises:
            UserError: the package supervision is not installed.
        """
        try:
            from supervision import Detections
        except ImportError as error:
            raise UserError("to_supervision needs the package supervision: pip install supervision") from error
        boxes = self.boxes.numpy().copy()
        boxes[:, 2:] += np.float32(self.convention.extra)
        return Detections(
            xyxy=boxes,
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy() - 1,
            data={"class_name": np.array(self.names, dtype=str)},
        )
