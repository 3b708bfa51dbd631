"""Images and training targets from annotations."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.mixing import MixingAugmentation
from cpm_rcnn.data.problem import counted
from cpm_rcnn.data.samplers import Sample
from cpm_rcnn.data.settings import OnError
from cpm_rcnn.data.tiles import Tiles
from cpm_rcnn.data.transforms import Augmentation, Target, choose, sample_rng, select_objects
from cpm_rcnn.errors import UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ImageFaults:
    """The images of a split that were reported, in memory shared by all loaders of a process and their workers.

    Attributes:
        unreadable: (I,) bool, the images that cannot be read.
        ends_early: (I,) bool, the images that lack their last bytes.
    """

    unreadable: Tensor
    ends_early: Tensor

    @classmethod
    def none(cls, count: int) -> "ImageFaults":
        """No fault in ``count`` images."""
        return cls(*(torch.zeros(count, dtype=torch.bool).share_memory_() for _ in range(2)))


class CocoDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images and targets of one split, augmented.

    An integer index i returns row i of the annotations, or with ``tiles`` tile i, so any sampler works. The training
    order indexes with a :class:`~cpm_rcnn.data.samplers.Sample`, which also contains the number of the sample in the
    run; for an integer, this number is the row.

    Each item is the image (3, h, w), uint8 RGB, and its target: ``boxes`` (N, 4) float32 xyxy in pixels of that image,
    ``labels`` (N,) int64, ``image_id`` (int), ``original_size`` (height, width) in the json, ``readable`` (bool), and
    whatever the augmentations added. Targets hold the usable objects only, clipped to the image.

    Args:
        annotations: annotations of the split.
        images: reads the image files of the split.
        augmentations: applied in order, see :class:`~cpm_rcnn.data.transforms.Augmentation`; those that mix images
            (:class:`~cpm_rcnn.data.mixing.MixingAugmentation`) get images of ``replacements``. In evaluation, they may
            only resize: detections are scaled back by the ratio of ``original_size`` to the size of the image.
        convention: convention of the boxes.
        seed: random seed of the run; with the sample number, it decides what the augmentations draw.
        on_error: what to do with an image that cannot be read. ``raise`` stops. ``skip`` logs a warning, once per
            file, and in training returns the next readable image of ``replacements``, the same one at every visit; in
            evaluation a black image with ``readable`` False, for which no detection may be counted.
        replacements: ascending rows of the images that may replace an unreadable one or be mixed into others: those
            used in training. None in evaluation.
        faults: which images were reported already; None starts without.
        tiles: the tiles of the images, each of which becomes an item, and a row wherever rows are mentioned here; None
            for whole images. In evaluation, the detector cuts the images into tiles itself.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        images: ImageSource,
        augmentations: Sequence[Augmentation | MixingAugmentation],
        convention: BoxConvention,
        seed: int = 0,
        on_error: OnError = "raise",
        replacements: np.ndarray | None = None,
        faults: "ImageFaults | None" = None,
        tiles: Tiles | None = None,
    ) -> None:
        self.annotations = annotations if tiles is None else tiles.annotations
        self.tiles = tiles
        self.images = images
        self.augmentations = list(augmentations)
        self.convention = convention
        self.seed = seed
        self.on_error = on_error
        self.replacements = replacements
        self.faults = faults or ImageFaults.none(len(annotations))

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int | Sample) -> tuple[Tensor, dict[str, Any]]:
        """The image and target of a row.

        Raises:
            IndexError: there is no such row.
            UserError: the image cannot be read or does not have the size given in the json; with ``skip`` in
                training, no image can be read.
            UnavailableError: the server of a remote image refuses or does not answer, also with ``skip``: which images
                are replaced must not depend on that.
        """
        sample = index if isinstance(index, Sample) else Sample(int(index), int(index))
        if not 0 <= sample.image < len(self):
            raise IndexError(f"row {sample.image} of {counted(len(self), 'image', 'images')}")
        try:
            return self._load(sample)
        except UserError as error:
            if self.on_error == "raise":
                raise UserError(f"{error}; on_error=skip continues without such images") from error
            if self.replacements is None:
                self._warn(sample.image, f"{error}; counts as an image without detections")
                return self._blank(sample)
            self._warn(sample.image, f"{error}; replaced by another image")
        for row in self._replacements_of(sample.image):
            try:
                return self._load(Sample(row, sample.number))
            except UserError as error:
                self._warn(row, f"{error}; replaced by another image")
        raise UserError(f"{self.images.path}: none of the training images can be read")

    def _load(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        image, target = self._augment(*self._stored(sample.image), sample)
        # In the inclusive convention, scaling can make the size of a box of less than one pixel negative.
        width, height = self.convention.sizes(target["boxes"])
        target = select_objects(target, (width > 0) & (height > 0))
        return image, self._described(target, sample.image, readable=True)

    def _stored(self, row: int) -> tuple[Tensor, Target]:
        """The image of a row and its usable objects, clipped to the image, as they are stored."""
        annotations = self.annotations
        image = self._pixels(row)
        size = int(annotations.heights[row]), int(annotations.widths[row])
        objects = slice(annotations.offsets[row], annotations.offsets[row + 1])
        usable = annotations.usable[objects]
        xywh = torch.from_numpy(annotations.xywh[objects][usable].astype(np.float32))
        boxes = self.convention.clip(self.convention.from_xywh(xywh), torch.tensor(size))
        labels = torch.from_numpy(annotations.labels[objects][usable])
        return image, {"boxes": boxes, "labels": labels}

    def _pixels(self, row: int) -> Tensor:
        """The image or tile of a row, (3, H, W) uint8, as it is stored."""
        whole = self.annotations if self.tiles is None else self.tiles.whole
        image_row = self._image_row(row)
        size = int(whole.heights[image_row]), int(whole.widths[image_row])
        warn = partial(self._warn_early_end, row)
        try:
            image = self.images.read(str(whole.file_names[image_row]), size, warn)
        except UserError as error:
            raise UserError(f"{error} (image {whole.image_ids[image_row]} of {whole.path})") from error
        if self.tiles is None:
            return image
        left, top, right, bottom = self.tiles.boxes[row].tolist()
        return image[:, top:bottom, left:right].contiguous()

    def _image_row(self, row: int) -> int:
        """The row of the image that a row shows, or shows a part of."""
        return row if self.tiles is None else int(self.tiles.images[row])

    def _other(self, rng: Generator) -> tuple[Tensor, Target]:
        """Another image for a :class:`~cpm_rcnn.data.mixing.MixingAugmentation`, as it is stored."""
        rows = np.arange(len(self)) if self.replacements is None else self.replacements
        row = int(rows[choose(rng, len(rows))])
        try:
            return self._stored(row)
        except UserError as error:
            if self.on_error == "raise" or self.replacements is None:
                raise
            self._warn(row, f"{error}; replaced by another image")
        for replacement in self._replacements_of(row):
            try:
                return self._stored(replacement)
            except UserError as error:
                self._warn(replacement, f"{error}; replaced by another image")
        raise UserError(f"{self.images.path}: none of the training images can be read")

    def _blank(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        """A small black image without objects, which takes the place of an image that cannot be read."""
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        image, target = self._augment(image, nothing, sample)
        return image, self._described(target, sample.image, readable=False)

    def _augment(self, image: Tensor, target: Target, sample: Sample) -> tuple[Tensor, Target]:
        rng = sample_rng(self.seed, sample.number)
        for augmentation in self.augmentations:
            if isinstance(augmentation, MixingAugmentation):
                image, target = augmentation(image, target, rng, self._other)
            else:
                image, target = augmentation(image, target, rng)
        return image, target

    def _described(self, target: Target, row: int, readable: bool) -> dict[str, Any]:
        """``target`` with the entries that describe the image as a whole."""
        annotations = self.annotations
        return {
            **target,
            "image_id": int(annotations.image_ids[row]),
            "original_size": (int(annotations.heights[row]), int(annotations.widths[row])),
            "readable": readable,
        }

    def _replacements_of(self, row: int) -> list[int]:
        """Rows that may replace ``row``: those of other images after it, then from the start; its orientation first.

        Batches hold images of one orientation, so such a replacement needs no extra padding.
        """
        assert self.replacements is not None
        others = np.roll(self.replacements, -np.searchsorted(self.replacements, row, side="right"))
        others = others[(others if self.tiles is None else self.tiles.images[others]) != self._image_row(row)]
        portrait = self.annotations.portrait
        return others[np.argsort(portrait[others] != portrait[row], kind="stable")].tolist()

    def _warn(self, row: int, message: str) -> None:
        image_row = self._image_row(row)
        if not self.faults.unreadable[image_row]:
            self.faults.unreadable[image_row] = True
            _log.warning("%s (on_error=skip, unreadable so far: %d)", message, self.faults.unreadable.sum())

    def _warn_early_end(self, row: int, message: str) -> None:
        image_row = self._image_row(row)
        if not self.faults.ends_early[image_row]:
            self.faults.ends_early[image_row] = True
            _log.warning("%s (image %d of %s)", message, self.annotations.image_ids[row], self.annotations.path)
