"""COCO-style annotations: a json read once, checked, and handed on as arrays and training targets."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.samplers import Sample
from cpm_rcnn.data.validation import check_json, read_json
from cpm_rcnn.errors import UserError

_log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """The annotations of one split, flat over its objects and sorted by image.

    I images, A objects, C categories. Everything that grows with the split is a numpy array, which forked DataLoader
    workers share instead of copying.

    Attributes:
        path: the json.
        image_ids: (I,) int64, COCO's ids; an image's row here is its index everywhere else.
        file_names: (I,) str.
        heights: (I,) int64 pixels.
        widths: (I,) int64 pixels.
        category_ids: C ids, ascending. Label ``k + 1`` stands for ``category_ids[k]``; label 0 is background.
        category_names: C names in the same order.
        has_annotations: False where the json lists images alone, as that of COCO's test-dev does.
        offsets: (I + 1,) int64; the objects of image i are rows ``offsets[i]`` to ``offsets[i + 1]``.
        labels: (A,) int64, 1..C.
        xywh: (A, 4) float32, COCO's x, y, width, height in pixels.
        areas: (A,) float32, square pixels; the box's own where the json has none.
        crowds: (A,) bool, COCO's ``iscrowd``.
        usable: (A,) bool, the objects to train on: no crowds, and some of the box lies inside its image.
        skipped_images: places in the json's list of what was left out for a fault.
        skipped_objects: the same of its annotations, of which those of skipped images are part.
    """

    path: Path
    image_ids: np.ndarray
    file_names: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    category_ids: list[int]
    category_names: list[str]
    has_annotations: bool
    offsets: np.ndarray
    labels: np.ndarray
    xywh: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    usable: np.ndarray
    skipped_images: frozenset[int]
    skipped_objects: frozenset[int]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The categories as COCO writes them, ``{"id": .., "name": ..}``, by ascending id."""
        return [{"id": key, "name": name} for key, name in zip(self.category_ids, self.category_names)]

    @property
    def portrait(self) -> np.ndarray:
        """(I,) bool, the images that are higher than wide."""
        return self.heights > self.widths

    def images_with_objects(self) -> np.ndarray:
        """Rows (int64) of the images with at least one usable object."""
        image_of_object = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return np.unique(image_of_object[self.usable])

    @classmethod
    def load(
        cls, path: str | Path, categories: Sequence[dict[str, Any]] | None = None, on_error: OnError = "raise"
    ) -> "CocoAnnotations":
        """Read and check a COCO-style json.

        Boxes of zero width or height, of which COCO's own ``instances_train2017.json`` has two, are kept but not
        usable, as are those that touch their image's edge from outside; a warning in the log names them.

        Args:
            path: the json.
            categories: those that a model already knows, each with ``id`` and ``name``. They set the labels, and the
                json may not have others.
            on_error: ``raise``, or ``skip``: leave out the images and annotations that are at fault, and count them
                in a warning in the log. Of several with one id, the first stays.

        Raises:
            UserError: no such file, not COCO json, categories that are faulty or other than ``categories``, boxes
                that are x1, y1, x2, y2 by mistake, or no image; under ``raise`` any fault of an image or annotation.
                One line with all kinds of faults, their counts and the first ids.
        """
        path = Path(path)
        content = read_json(path)
        found = check_json(content, categories)
        if found.fatal or (found.faults and on_error == "raise"):
            raise UserError(f"{path}: {'; '.join(found.fatal + found.faults)}")
        if not found.good_images.any():
            raise UserError(f"{path}: no image is without fault; {'; '.join(found.faults)}")
        kept = found.good_objects & found.good_images[found.image_rows]
        notes = [found.flat] if found.flat else []
        if found.faults:
            notes.append(f"data.on_error=skip leaves out {'; '.join(found.faults)}")
        if along := (found.good_objects & ~kept).sum():
            notes.append(f"with their images {along} annotations without fault")
        if notes:
            _log.warning("%s: %s", path, "; ".join(notes))

        known = sorted(content.get("categories", []) if categories is None else categories, key=lambda c: c["id"])
        category_ids = [int(category["id"]) for category in known]
        images, objects = np.flatnonzero(found.good_images), np.flatnonzero(kept)
        heights, widths = found.heights[images], found.widths[images]
        image_rows = np.searchsorted(images, found.image_rows[objects])
        order = np.argsort(image_rows, kind="stable")
        objects, image_rows = objects[order], image_rows[order]
        boxes, crowds = found.boxes[objects], found.crowds[objects]
        limits = np.stack([widths, heights], axis=1)[image_rows]
        inside = np.minimum(boxes[:, :2] + boxes[:, 2:], limits) > np.maximum(boxes[:, :2], 0)
        return cls(
            path=path,
            image_ids=found.image_ids[images],
            file_names=np.array(found.file_names, dtype=str)[images],
            heights=heights,
            widths=widths,
            category_ids=category_ids,
            category_names=[str(category["name"]) for category in known],
            has_annotations="annotations" in content,
            offsets=np.searchsorted(image_rows, np.arange(len(images) + 1)),
            labels=np.searchsorted(category_ids, found.category_ids[objects]) + 1,
            xywh=boxes.astype(np.float32),
            areas=found.areas[objects].astype(np.float32),
            crowds=crowds,
            usable=inside.all(axis=1) & ~crowds,
            skipped_images=frozenset(np.flatnonzero(~found.good_images).tolist()),
            skipped_objects=frozenset(np.flatnonzero(~kept).tolist()),
        )


class CocoDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images and targets of one split, at network size.

    Indexed by a :class:`~cpm_rcnn.data.samplers.Sample`, it returns the image, (3, h, w) uint8 RGB, and its target:
    ``boxes`` (N, 4) float32 xyxy in pixels of that image, ``labels`` (N,) int64, ``image_id`` (int),
    ``original_size`` (height, width) in the json, and ``readable`` (bool). Targets hold the usable objects alone,
    clipped to the image.

    Args:
        annotations: of the split.
        images: where its files live.
        transform: takes image (3, H, W), boxes (N, 4) and the sample's number; returns both at network size.
        convention: the convention of the boxes.
        on_error: what becomes of an image that cannot be read. ``raise``; or ``skip``, with a warning in the log once
            for each file: in training, the next image that can be read takes its place, the same at every visit; in
            evaluation a black image with ``readable`` False does, on which nothing counts as found.
        stand_ins: ascending rows of the images that may take another's place: those to train on; None in evaluation.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        images: ImageSource,
        transform: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
        convention: BoxConvention,
        on_error: OnError = "raise",
        stand_ins: np.ndarray | None = None,
    ) -> None:
        self.annotations = annotations
        self.images = images
        self.transform = transform
        self.convention = convention
        self.on_error = on_error
        self.stand_ins = stand_ins
        # Which images were found unreadable; shared by the loader's workers, so that each is told of once.
        self._unreadable = torch.zeros(len(annotations), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        """The sample's image and target.

        Raises:
            UserError: the image cannot be read or has another size than the json says; under ``skip`` in training,
                no image can be read.
        """
        try:
            return self._load(sample)
        except UserError as error:
            if self.on_error == "raise":
                raise
            if self.stand_ins is None:
                self._warn(sample.image, f"{error}; counts as an image in which nothing was found")
                return self._blank(sample)
            self._warn(sample.image, f"{error}; another takes its place")
        for row in self._successors(sample.image):
            try:
                return self._load(Sample(row, sample.number))
            except UserError as error:
                self._warn(row, f"{error}; another takes its place")
        raise UserError(f"{self.images.path}: none of the images to train on can be read")

    def _load(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        listed, row = self.annotations, sample.image
        size = int(listed.heights[row]), int(listed.widths[row])
        try:
            image = self.images.read(str(listed.file_names[row]), size)
        except UserError as error:
            raise UserError(f"{error} (image {listed.image_ids[row]} of {listed.path})") from error

        objects = slice(listed.offsets[row], listed.offsets[row + 1])
        usable = listed.usable[objects]
        boxes = self.convention.from_xywh(torch.from_numpy(listed.xywh[objects][usable]))
        boxes = self.convention.clip(boxes, torch.tensor(size))
        image, boxes = self.transform(image, boxes, sample.number)
        # In the inclusive convention, a sliver under one pixel can turn negative when it is scaled.
        width, height = self.convention.sizes(boxes)
        keep = (width > 0) & (height > 0)
        return image, {
            "boxes": boxes[keep],
            "labels": torch.from_numpy(listed.labels[objects][usable])[keep],
            "image_id": int(listed.image_ids[row]),
            "original_size": size,
            "readable": True,
        }

    def _blank(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        """What stands for an image that cannot be read, without objects; of a usual size, whatever the json claims."""
        listed, row = self.annotations, sample.image
        image, boxes = self.transform(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(0, 4), sample.number)
        return image, {
            "boxes": boxes,
            "labels": torch.zeros(0, dtype=torch.int64),
            "image_id": int(listed.image_ids[row]),
            "original_size": (int(listed.heights[row]), int(listed.widths[row])),
            "readable": False,
        }

    def _successors(self, row: int) -> list[int]:
        """The other rows that may take the place of ``row``: upward from it and around, those of its shape first."""
        assert self.stand_ins is not None
        around = np.roll(self.stand_ins, -np.searchsorted(self.stand_ins, row, side="right"))
        around = around[around != row]
        portrait = self.annotations.portrait
        return around[np.argsort(portrait[around] != portrait[row], kind="stable")].tolist()

    def _warn(self, row: int, message: str) -> None:
        if not self._unreadable[row]:
            self._unreadable[row] = True
            _log.warning("%s (data.on_error=skip, unreadable so far: %d)", message, self._unreadable.sum())
