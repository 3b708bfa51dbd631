"""What ``predict`` writes about each image, one class per kind of output."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from torch import Tensor

from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import ImageDetections
from cpm_rcnn.reporting.pictures import draw, save


class Output(Protocol):
    """Writes the detections of images."""

    def add(self, image_id: int, name: str, image: Tensor, found: ImageDetections) -> None:
        """Write the detections of an image.

        Args:
            image_id: number of the image, from 1.
            name: its file name, with folders.
            image: uint8 (3, H, W).
            found: all its detections.
        """

    def close(self) -> None:
        """Write what belongs to all images."""


class Pictures:
    """Copies of the images with the detections drawn on them, ``images/NAME.png``."""

    def __init__(self, folder: Path, class_names: Sequence[str], min_scores: Sequence[float]) -> None:
        self._folder, self._class_names, self._min_scores = folder / "images", class_names, min_scores

    def add(self, image_id: int, name: str, image: Tensor, found: ImageDetections) -> None:
        """See :class:`Output`."""
        picture = draw(image, found.to_dict(), self._class_names, min_score=self._min_scores)
        save(picture, self._folder / f"{name}.png")

    def close(self) -> None:
        """Nothing is left to write."""


class Coco:
    """All detections in COCO's format of results, ``detections.json``."""

    def __init__(self, folder: Path, class_names: Sequence[str], min_scores: Sequence[float]) -> None:
        self._path = folder / "detections.json"
        self._rows: list[dict[str, Any]] = []

    def add(self, image_id: int, name: str, image: Tensor, found: ImageDetections) -> None:
        """See :class:`Output`."""
        self._rows += [{"file_name": name, **row} for row in found.to_coco(image_id)]

    def close(self) -> None:
        """Write the file."""
        self._path.write_text(json.dumps(self._rows))


class Csv:
    """A table of the detections from the minimum scores on, ``detections.csv``."""

    def __init__(self, folder: Path, class_names: Sequence[str], min_scores: Sequence[float]) -> None:
        self._min_scores = min_scores
        self._file: IO[str] = (folder / "detections.csv").open("w", newline="")
        self._table = csv.writer(self._file)
        self._table.writerow(["file_name", "class", "score", "x1", "y1", "x2", "y2"])

    def add(self, image_id: int, name: str, image: Tensor, found: ImageDetections) -> None:
        """See :class:`Output`."""
        found = found.above(self._min_scores)
        for label, score, box in zip(found.names, found.scores.tolist(), found.boxes.tolist()):
            self._table.writerow([name, label, f"{score:.6g}", *(f"{side:.2f}" for side in box)])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Yolo:
    """YOLO's text files, ``labels/NAME.txt``, of the detections from the minimum scores on, and ``classes.txt``.

    A line is the class, counted from 0, the center, width and height of the box as parts of the image's width and
    height, and the score.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], min_scores: Sequence[float]) -> None:
        self._folder, self._min_scores = folder / "labels", min_scores
        self._folder.mkdir(exist_ok=True)
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in class_names))
        self._images: dict[Path, str] = {}

    def add(self, image_id: int, name: str, image: Tensor, found: ImageDetections) -> None:
        """See :class:`Output`.

        Raises:
            UserError: another image has the same name but for its suffix.
        """
        path = self._folder / Path(name).with_suffix(".txt")
        if path in self._images:
            raise UserError(f"{name}, {self._images[path]}: YOLO's format has one file for both, {path.name}")
        self._images[path] = name
        found = found.above(self._min_scores)
        height, width = image.shape[-2:]
        boxes = found.convention.to_xywh(found.boxes)
        boxes = boxes.clone()
        boxes[:, :2] += boxes[:, 2:] / 2
        boxes /= boxes.new_tensor([width, height, width, height])
        lines = [
            f"{label - 1} {' '.join(f'{side:.6f}' for side in box)} {score:.6f}\n"
            for label, box, score in zip(found.labels.tolist(), boxes.tolist(), found.scores.tolist())
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))

    def close(self) -> None:
        """Nothing is left to write."""


class Crops:
    """The parts of the images inside the boxes, from the minimum scores on, ``crops/CLASS/NAME_1.png``."""

    def __init__(self, folder: Path, class_names: Sequence[str], min_scores: Sequence[float]) -> None:
        self._folder, self._min_scores = folder / "crops", min_scores

    def add(self, image_id: int, name: str, image: Tensor, found: ImageDetections) -> None:
        """See :class:`Output`."""
        found = found.above(self._min_scores)
        height, width = image.shape[-2:]
        numbers: Counter[str] = Counter()
        for label, box in zip(found.names, found.boxes.tolist()):
            x1, y1 = (max(0, int(side)) for side in box[:2])
            x2, y2 = (min(limit, int(side) + 1) for side, limit in zip(box[2:], (width, height)))
            if x1 < x2 and y1 < y2:
                numbers[label] += 1
                place = self._folder / label.replace("/", "_") / f"{name}_{numbers[label]}.png"
                save(image[:, y1:y2, x1:x2], place)

    def close(self) -> None:
        """Nothing is left to write."""


# From the folder of the results, the names of the classes 1..C and their C minimum scores.
OUTPUTS: dict[str, Callable[[Path, Sequence[str], Sequence[float]], Output]] = {
    "pictures": Pictures,
    "coco": Coco,
    "csv": Csv,
    "yolo": Yolo,
    "crops": Crops,
}
