"""COCO-style annotations: files are read and checked once, and their content is stored in arrays."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpm_rcnn.data.classes import ClassSelection
from cpm_rcnn.data.problem import Problem, counted
from cpm_rcnn.data.raw import RawAnnotations
from cpm_rcnn.data.settings import OnError
from cpm_rcnn.data.validation import check_categories, check_json
from cpm_rcnn.errors import UserError
from cpm_rcnn.remote.urls import Location, Url

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """The annotations of one split, in flat arrays sorted by image.

    It contains everything that training and evaluation need, so the file is parsed only once. Segmentation masks are
    not kept, because they take most of the memory and only their areas are used.

    I, A and C are the numbers of images, objects and categories. Everything that grows with the split is a numpy array,
    which forked DataLoader workers share instead of copying.

    Attributes:
        path: the json file, or the file or folder of another format that states which images the split has.
        is_json: whether ``path`` is a local COCO-style json with exactly these images, objects and classes.
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
        numbers: (A,) int64, the number of each object in ``number_format``.
        number_format: how to name an object: ``annotation {}`` by its id, or by its position, or by its ``line {}``.
        faults: the errors in the file, whose images and annotations were skipped.
        notes: what is valid but unusual in the file.
    """

    path: Location
    is_json: bool
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
    numbers: np.ndarray
    number_format: str
    faults: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()

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

    def images_without_objects(self) -> np.ndarray:
        """Rows (int64) of the images without any object, also none that training ignores."""
        return np.flatnonzero(np.diff(self.offsets) == 0)

    def select(self, rows: np.ndarray, min_box_size: float = 0.0) -> "CocoAnnotations":
        """The annotations of some of the images.

        Args:
            rows: rows (int64) of the images, in the new order.
            min_box_size: as in :meth:`load`.
        """
        counts = np.diff(self.offsets)[rows]
        starts = np.repeat(self.offsets[rows] - np.cumsum(counts) + counts, counts)
        objects = starts + np.arange(counts.sum())
        heights, widths, xywh, crowds = self.heights[rows], self.widths[rows], self.xywh[objects], self.crowds[objects]
        limits = np.repeat(np.stack([widths, heights], axis=1), counts, axis=0)
        return replace(
            self,
            is_json=False,
            image_ids=self.image_ids[rows],
            file_names=self.file_names[rows],
            heights=heights,
            widths=widths,
            offsets=np.append(0, np.cumsum(counts)),
            labels=self.labels[objects],
            xywh=xywh,
            areas=self.areas[objects],
            crowds=crowds,
            usable=_usable(xywh, limits, crowds, min_box_size),
            numbers=self.numbers[objects],
        )

    def to_coco(self) -> dict[str, Any]:
        """The content of a COCO-style json with these images, objects and listed categories."""
        images = zip(
            self.image_ids.tolist(), self.file_names.tolist(), self.heights.tolist(), self.widths.tolist(), strict=True
        )
        objects = zip(
            self.image_ids[self.image_rows].tolist(),
            (self.category_ids[label - 1] for label in self.labels.tolist()),
            self.xywh.tolist(),
            self.areas.tolist(),
            self.crowds.astype(int).tolist(),
            strict=True,
        )
        content: dict[str, Any] = {
            "images": [dict(zip(("id", "file_name", "height", "width"), values)) for values in images],
            "categories": [category for category, listed in zip(self.categories, self.listed) if listed],
        }
        if self.has_annotations:
            keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
            content["annotations"] = [
                {"id": number, **dict(zip(keys, values))} for number, values in enumerate(objects, start=1)
            ]
        return content

    @classmethod
    def load(
        cls,
        path: str | Path | Url,
        categories: Sequence[dict[str, Any]] | None = None,
        on_error: OnError = "raise",
        folder: str | Path | Url | None = None,
        min_box_size: float = 0.0,
    ) -> "CocoAnnotations":
        """Read and check a COCO-style json file.

        Args:
            path: the json file.
            categories: as in :meth:`check`.
            on_error: as in :meth:`check`.
            folder: as in :meth:`check`.
            min_box_size: as in :meth:`check`.

        Raises:
            UserError: the file cannot be read or is not in COCO's format, or :meth:`check` refuses it.
        """
        raw = RawAnnotations.from_json(Path(path) if isinstance(path, str) else path)
        return cls.check(raw, categories, on_error, folder, min_box_size)

    @classmethod
    def check(
        cls,
        raw: RawAnnotations,
        categories: Sequence[dict[str, Any]] | None = None,
        on_error: OnError = "raise",
        folder: str | Path | Url | None = None,
        min_box_size: float = 0.0,
        classes: ClassSelection | None = None,
        warn: Callable[[str], None] = _log.warning,
    ) -> "CocoAnnotations":
        """Check annotations that were read from files.

        Boxes of zero width or height (COCO's own ``instances_train2017.json`` has two) and boxes that only touch their
        image from outside are kept, but are not usable in training; a warning in the log names them.

        Args:
            raw: the annotations.
            categories: the categories that a model already knows, each with ``id`` and ``name``. They decide the
                labels, and no annotation may have another one. Those of the file are found among them by name
                (:func:`~cpm_rcnn.data.classes.match_categories`). None takes the categories of the file.
            on_error: ``raise``, or ``skip``: skip invalid images and annotations and log a warning with their number.
                Of several entries with the same id, the first is kept.
            folder: where the images are. Absolute file names inside a local one become relative to it, all others are
                invalid.
            min_box_size: objects whose width or height inside their image is at most this many pixels are not usable.
            classes: the classes to keep, with the names that they have in the file; needs ``categories``. None keeps
                all.
            warn: receives one line about what was skipped and what is unusual, if anything.

        Raises:
            UserError: categories are invalid or not in ``categories``; boxes look like x1, y1, x2, y2 or like fractions
                of the image; no image is valid; or, with ``raise``, any image or annotation is invalid. One line lists
                all kinds of errors, each with its count and first ids or lines.
        """
        if categories is not None:
            check_categories("categories", categories)
        path, content = raw.path, raw.content
        local = Path(folder) if isinstance(folder, (str, Path)) else None
        found = check_json(content, categories, local, classes, raw.image_name, raw.object_name)
        faults = raw.faults + found.faults
        if found.fatal or (faults and on_error == "raise"):
            advice = [] if found.fatal else ["correct the file, or skip these with on_error=skip"]
            raise UserError(f"{path}: {'; '.join([*found.fatal, *map(str, faults), *advice])}")
        if not found.good_images.any():
            raise UserError(f"{path}: no image is valid; {'; '.join(map(str, faults))}")
        kept = found.good_objects & found.good_images[found.image_rows] & ~found.left_out
        notes = raw.notes + found.notes
        messages = list(map(str, notes))
        if faults:
            messages.append(f"on_error=skip: skipped {'; '.join(map(str, faults))}")
        if valid := (found.good_objects & ~found.good_images[found.image_rows]).sum():
            messages.append(f"skipped {counted(valid, 'valid annotation', 'valid annotations')} of skipped images")
        if messages:
            warn(f"{path}: {'; '.join(messages)}")

        known = sorted(content.get("categories", []) if categories is None else categories, key=lambda c: c["id"])
        category_ids = [int(category["id"]) for category in known]
        listed = np.isin(category_ids, found.listed_ids)
        images, objects = np.flatnonzero(found.good_images), np.flatnonzero(kept)
        heights, widths = found.heights[images], found.widths[images]
        image_rows = np.searchsorted(images, found.image_rows[objects])
        order = np.argsort(image_rows, kind="stable")
        objects, image_rows = objects[order], image_rows[order]
        boxes, crowds = found.boxes[objects], found.crowds[objects]
        limits = np.stack([widths, heights], axis=1)[image_rows]
        numbers, number_format = _numbers(raw, objects)
        return cls(
            path=path,
            is_json=raw.object_name is None and classes is None and isinstance(path, Path),
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
            usable=_usable(boxes, limits, crowds, min_box_size),
            numbers=numbers,
            number_format=number_format,
            faults=tuple(faults),
            notes=tuple(notes),
        )


def _numbers(raw: RawAnnotations, objects: np.ndarray) -> tuple[np.ndarray, str]:
    """The numbers (A,) int64 and their format by which the objects at some positions (A,) are named."""
    entries = raw.content.get("annotations", [])
    key = "id" if raw.object_name is None else "line"
    # Either all have an id or none.
    if not len(objects) or key not in entries[objects[0]]:
        return objects, "annotations[{}]"
    numbers = np.fromiter((entries[row][key] for row in objects.tolist()), np.int64, len(objects))
    return numbers, "annotation {}" if key == "id" else "line {}"


def _usable(xywh: np.ndarray, limits: np.ndarray, crowds: np.ndarray, min_box_size: float) -> np.ndarray:
    """(A,) bool, the objects used in training, from their boxes, the (width, height) of their images, and crowds."""
    inside = np.minimum(xywh[:, :2] + xywh[:, 2:], limits) - np.maximum(xywh[:, :2], 0)
    return (inside > min_box_size).all(axis=1) & ~crowds
