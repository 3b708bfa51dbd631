"""One split as the checks see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.doctor.finding import EXAMPLES, Box, Example
from cpm_rcnn.data.settings import DataSettings, Split
from cpm_rcnn.data.transforms import network_size

# Boxes that an example of a whole image has at most.
_BOXES = 100


@dataclass(frozen=True, eq=False)
class CheckedSplit:
    """The annotations of a split with I images and A objects, of which U are used.

    An object is used if it is not a crowd and has an area inside its image of more than ``min_box_size``.

    Attributes:
        name: the split.
        annotations: its annotations.
        input_sizes: (I, 2) int64, height and width of each image as the network gets it, in pixels; if it gets tiles of
            it, those of the whole image at their scale.
    """

    name: Split
    annotations: CocoAnnotations
    input_sizes: np.ndarray

    @classmethod
    def of(cls, name: Split, annotations: CocoAnnotations, settings: DataSettings) -> "CheckedSplit":
        """The split with the image sizes of training or test; of several lengths of training, the median one."""
        if name == "train":
            short_side: int | None = sorted(settings.short_sides)[len(settings.short_sides) // 2]
            max_size, rounding = settings.max_size, settings.resize_rounding
        else:
            short_side, max_size, rounding = settings.test_short_side, settings.test_max_size, "nearest"
        sizes = np.stack([annotations.heights, annotations.widths], axis=1)
        if short_side is None:
            return cls(name, annotations, sizes)
        tiles = sizes if settings.tile is None else np.minimum(sizes, settings.tile)
        # As one number each, because np.unique sorts numbers much faster than rows.
        keys, inverse = np.unique(tiles[:, 0] << 32 | tiles[:, 1], return_inverse=True)
        resized = [network_size((key >> 32, key & 0xFFFFFFFF), short_side, max_size, rounding) for key in keys.tolist()]
        input_tiles = np.array(resized, dtype=np.int64).reshape(-1, 2)[inverse]
        return cls(name, annotations, input_tiles if settings.tile is None else input_tiles * sizes // tiles)

    @cached_property
    def objects(self) -> np.ndarray:
        """(U,) int64, the used objects as rows of the annotations."""
        return np.flatnonzero(self.annotations.usable)

    @cached_property
    def image_rows(self) -> np.ndarray:
        """(U,) int64, the images of the used objects as rows of the annotations."""
        return self.annotations.image_rows[self.objects]

    @cached_property
    def labels(self) -> np.ndarray:
        """(U,) int64 in 1..C, the labels of the used objects."""
        return self.annotations.labels[self.objects]

    @cached_property
    def boxes(self) -> np.ndarray:
        """(U, 4) float32, the used objects inside their images, xyxy pixels of the original images."""
        xywh = self.annotations.xywh[self.objects]
        limits = np.stack([self.annotations.widths, self.annotations.heights], axis=1)[self.image_rows]
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        return np.clip(corners, 0, np.tile(limits, 2)).astype(np.float32)

    @cached_property
    def input_boxes(self) -> np.ndarray:
        """(U, 4) float32, the used objects in pixels of the resized images, xyxy."""
        originals = np.stack([self.annotations.heights, self.annotations.widths], axis=1)
        ratios = (self.input_sizes / originals).astype(np.float32)[:, ::-1]
        return self.boxes * np.tile(ratios, 2)[self.image_rows]

    def image_name(self, row: int) -> str:
        """The name of an image, by its row, with the split."""
        return f"{self.name}/{self.annotations.file_names[row]}"

    def image_example(self, row: int, detail: str = "") -> Example:
        """An image, by its row, with its objects."""
        annotations = self.annotations
        start, end = annotations.offsets[row : row + 2]
        return self._example(row, annotations.xywh[start : min(end, start + _BOXES)], self._image_id(row), detail, True)

    def object_example(self, used: int, detail: str = "", others: Sequence[int] = ()) -> Example:
        """A used object, by its place among them.

        Args:
            used: the object.
            detail: what is special about it.
            others: other used objects that it shows.
        """
        rows = self.objects[[used, *others]]
        name = self.annotations.number_format.format(self.annotations.numbers[rows[0]])
        image = int(self.image_rows[used])
        return self._example(image, self.annotations.xywh[rows], name, detail, False)

    def category_example(self, label: int, detail: str = "") -> Example:
        """A class, by its label."""
        annotations = self.annotations
        name = f"category {annotations.category_ids[label - 1]} {annotations.category_names[label - 1]}"
        return Example(self.name, str(annotations.path), name, detail)

    def first_images(self, rows: np.ndarray) -> tuple[Example, ...]:
        """Examples of the first images of ``rows`` int64."""
        return tuple(map(self.image_example, rows[:EXAMPLES].tolist()))

    def _image_id(self, row: int) -> str:
        # Formats without ids of annotations have none of images either.
        is_line = self.annotations.number_format.startswith("line")
        return "" if is_line else f"image {self.annotations.image_ids[row]}"

    def _example(self, row: int, xywh: np.ndarray, name: str, detail: str, whole: bool) -> Example:
        annotations = self.annotations
        size = int(annotations.widths[row]), int(annotations.heights[row])
        boxes: tuple[Box, ...] = tuple(map(tuple, xywh.tolist()))
        return Example(self.name, str(annotations.file_names[row]), name, detail, size, boxes, whole)
