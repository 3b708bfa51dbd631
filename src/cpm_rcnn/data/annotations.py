"""COCO-style annotations: a json file is read and checked once, and its content is stored in arrays."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpm_rcnn.data.settings import OnError
from cpm_rcnn.data.validation import check_categories, check_json, counted, read_json
from cpm_rcnn.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """The annotations of one split, in flat arrays sorted by image.

    It contains everything that training and evaluation need, so the file is parsed only once. Segmentation masks are
    not kept, because they take most of the memory and only their areas are used.

    I, A and C are the numbers of images, objects and categories. Everything that grows with the split is a numpy array,
    which forked DataLoader workers share instead of copying.

    Attributes:
        path: the json file.
        image_ids: (I,) int64, COCO ids. The row of an image in this array is its index everywhere else.
        file_names: (I,) str.
        heights: (I,) int64 pixels.
        widths: (I,) int64 pixels.
        category_ids: C ids in ascending order. Label ``k + 1`` stands for ``category_ids[k]``; label 0 is background.
        category_names: C names in the same order.
        listed: (C,) bool, the categories that the json lists; all if it lists none of them. A model may know more.
        has_annotations: False if the json only lists images, as COCO's test-dev does.
        offsets: (I + 1,) int64; the objects of image i are the rows ``offsets[i]`` to ``offsets[i + 1]``, in the order
            of the file.
        labels: (A,) int64, 1..C.
        xywh: (A, 4) float64, COCO's x, y, width, height in pixels, exactly as in the file.
        areas: (A,) float64 square pixels, exactly as in the file; the area of the box if the file has none.
        crowds: (A,) bool, ``iscrowd`` in COCO's format.
        usable: (A,) bool, the objects used in training: not crowds, partly inside their image, and large enough.
            Evaluation uses all.
    """

    path: Path
    image_ids: np.ndarray
    file_names: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    category_ids: list[int]
    category_names: list[str]
    listed: np.ndarray
    has_annotations: bool
    offsets: np.ndarray
    labels: np.ndarray
    xywh: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    usable: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The categories in COCO's format, ``{"id": .., "name": ..}``, by ascending id."""
        return [{"id": key, "name": name} for key, name in zip(self.category_ids, self.category_names)]

    @property
    def portrait(self) -> np.ndarray:
        """(I,) bool, the images whose height exceeds their width."""
        return self.heights > self.widths

    @property
    def square(self) -> np.ndarray:
        """(I,) bool, the images whose height equals their width."""
        return self.heights == self.widths

    @property
    def image_rows(self) -> np.ndarray:
        """(A,) int64, the row of each object's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def images_with_objects(self) -> np.ndarray:
        """Rows (int64) of the images with at least one usable object."""
        return np.unique(self.image_rows[self.usable])

    @classmethod
    def load(
        cls,
        path: str | Path,
        categories: Sequence[dict[str, Any]] | None = None,
        on_error: OnError = "raise",
        folder: str | Path | None = None,
        min_box_size: float = 0.0,
    ) -> "CocoAnnotations":
        """Read and check a COCO-style json file.

        Boxes of zero width or height (COCO's own ``instances_train2017.json`` has two) and boxes that only touch their
        image from outside are kept, but are not usable in training; a warning in the log names them.

        Args:
            path: the json file.
            categories: the categories that a model already knows, each with ``id`` and ``name``. They decide the
                labels, and no annotation may have another one. None takes the categories of the file.
            on_error: ``raise``, or ``skip``: skip invalid images and annotations and log a warning with their number.
                Of several entries with the same id, the first is kept.
            folder: where the images are. Absolute file names inside it become relative to it, all others are invalid.
            min_box_size: objects whose width or height inside their image is at most this many pixels are not usable.

        Raises:
            UserError: the file cannot be read or is not in COCO's format; its categories are invalid or not in
                ``categories``; its boxes look like x1, y1, x2, y2 or like fractions of the image; no image is valid;
                or, with ``raise``, any image or annotation is invalid. One line lists all kinds of errors, each with
                its count and first ids.
        """
        path = Path(path)
        if categories is not None:
            check_categories("categories", categories)
        content = read_json(path)
        found = check_json(content, categories, None if folder is None else Path(folder))
        if found.fatal or (found.faults and on_error == "raise"):
            advice = [] if found.fatal else ["correct the file, or skip these with on_error=skip"]
            raise UserError(f"{path}: {'; '.join(found.fatal + found.faults + advice)}")
        if not found.good_images.any():
            raise UserError(f"{path}: no image is valid; {'; '.join(found.faults)}")
        kept = found.good_objects & found.good_images[found.image_rows]
        notes = list(found.notes)
        if found.faults:
            notes.append(f"on_error=skip: skipped {'; '.join(found.faults)}")
        if valid := (found.good_objects & ~kept).sum():
            notes.append(f"skipped {counted(valid, 'valid annotation', 'valid annotations')} of skipped images")
        if notes:
            _log.warning("%s: %s", path, "; ".join(notes))

        known = sorted(content.get("categories", []) if categories is None else categories, key=lambda c: c["id"])
        category_ids = [int(category["id"]) for category in known]
        listed = np.isin(category_ids, [category["id"] for category in content.get("categories", [])])
        images, objects = np.flatnonzero(found.good_images), np.flatnonzero(kept)
        heights, widths = found.heights[images], found.widths[images]
        image_rows = np.searchsorted(images, found.image_rows[objects])
        order = np.argsort(image_rows, kind="stable")
        objects, image_rows = objects[order], image_rows[order]
        boxes, crowds = found.boxes[objects], found.crowds[objects]
        limits = np.stack([widths, heights], axis=1)[image_rows]
        inside = np.minimum(boxes[:, :2] + boxes[:, 2:], limits) - np.maximum(boxes[:, :2], 0)
        return cls(
            path=path,
            image_ids=found.image_ids[images],
            file_names=np.array(found.file_names, dtype=str)[images],
            heights=heights,
            widths=widths,
            category_ids=category_ids,
            category_names=[category["name"] for category in known],
            listed=listed | (not listed.any()),
            has_annotations="annotations" in content,
            offsets=np.searchsorted(image_rows, np.arange(len(images) + 1)),
            labels=np.searchsorted(category_ids, found.category_ids[objects]) + 1,
            xywh=boxes,
            areas=found.areas[objects],
            crowds=crowds,
            usable=(inside > min_box_size).all(axis=1) & ~crowds,
        )
