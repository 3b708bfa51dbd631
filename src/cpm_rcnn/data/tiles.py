"""Tiles: overlapping windows that cover an image, and the objects in them."""

import math
from dataclasses import dataclass, replace

import numpy as np

from cpm_rcnn.data.annotations import CocoAnnotations

# Of an object that the edge of a tile cuts, at least this part of its area must be in the tile. Whatever the overlap,
# there is a tile with so much of each object that is no wider and no higher than a tile.
MIN_INSIDE = 0.25
# Objects that are compared with all tiles of their images at a time, which bounds the memory.
_OBJECTS = 10_000


def tile_grid(height: int, width: int, tile: int, overlap: float) -> np.ndarray:
    """The tiles of an image, row by row.

    Neighbors overlap by at least ``overlap`` of a tile's side, rounded to whole pixels. There are as few tiles as that
    allows, evenly spaced. All are of the same size and inside the image, and every object that is at most as wide and
    high as the overlap is whole in one of them. A side of the image that is not longer than a tile is not divided.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        tile: side of the square tiles in pixels.
        overlap: smallest overlap of neighbors as a part of a tile's side, at least 0 and below 1.

    Returns:
        (T, 4) int64, xyxy pixels; x2 and y2 are one past the last pixel.
    """
    tops, lefts = (_starts(side, tile, overlap) for side in (height, width))
    top, left = (corner.ravel() for corner in np.meshgrid(tops, lefts, indexing="ij"))
    return np.stack([left, top, left + min(tile, width), top + min(tile, height)], axis=1)


def _starts(side: int, tile: int, overlap: float) -> np.ndarray:
    """The first pixels (int64) of the tiles along a side of an image."""
    last = max(side - tile, 0)
    gaps = math.ceil(last / (tile - round(tile * overlap)))
    return np.arange(gaps + 1) * last // max(gaps, 1)


@dataclass(frozen=True, eq=False)
class Tiles:
    """The T tiles of all images of a split, in the order of the images.

    Attributes:
        whole: the annotations of the images.
        annotations: those of the tiles, as if each was an image. Its boxes are in pixels of the tile and may extend
            beyond it. An object is in all tiles that it overlaps. It is usable in those in which there is at least
            :data:`MIN_INSIDE` of its area, if it is usable in the image.
        images: (T,) int64, the image of each tile as a row of ``whole``.
        boxes: (T, 4) int64, the tiles in their images, as :func:`tile_grid` returns them.
    """

    whole: CocoAnnotations
    annotations: CocoAnnotations
    images: np.ndarray
    boxes: np.ndarray

    @classmethod
    def of(cls, whole: CocoAnnotations, tile: int, overlap: float, min_box_size: float = 0.0) -> "Tiles":
        """The tiles of a split.

        Args:
            whole: the annotations of the images.
            tile: as in :func:`tile_grid`.
            overlap: as in :func:`tile_grid`.
            min_box_size: objects whose width or height inside a tile is at most this many pixels are not usable there.
        """
        # Images of equal sizes have equal grids.
        sizes, kinds = np.unique(np.stack([whole.heights, whole.widths], axis=1), axis=0, return_inverse=True)
        grids = [tile_grid(height, width, tile, overlap) for height, width in sizes.tolist()]
        counts = np.array([len(grid) for grid in grids])[kinds.ravel()]
        images = np.repeat(np.arange(len(whole)), counts)
        boxes = np.concatenate([grids[kind] for kind in kinds.ravel()])

        objects, tiles = _overlapping(whole, boxes, np.cumsum(counts) - counts, counts)
        order = np.argsort(tiles, kind="stable")
        objects, tiles = objects[order], tiles[order]
        corners = np.pad(boxes[tiles, :2], ((0, 0), (0, 2)))
        limits = np.stack([whole.widths, whole.heights], axis=1)[images[tiles]]
        in_image = _sides(whole.xywh[objects], np.zeros_like(limits), limits)
        inside = _sides(whole.xywh[objects], boxes[tiles, :2], boxes[tiles, 2:])
        enough = inside.prod(axis=1) >= MIN_INSIDE * in_image.prod(axis=1)
        annotations = replace(
            whole,
            is_json=False,
            image_ids=whole.image_ids[images],
            file_names=whole.file_names[images],
            heights=boxes[:, 3] - boxes[:, 1],
            widths=boxes[:, 2] - boxes[:, 0],
            offsets=np.searchsorted(tiles, np.arange(len(boxes) + 1)),
            labels=whole.labels[objects],
            xywh=whole.xywh[objects] - corners,
            areas=whole.areas[objects],
            crowds=whole.crowds[objects],
            usable=whole.usable[objects] & enough & (inside > min_box_size).all(axis=1),
            numbers=whole.numbers[objects],
        )
        return cls(whole, annotations, images, boxes)


def _overlapping(
    whole: CocoAnnotations, boxes: np.ndarray, first: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of an object and a tile that overlap: the rows of the objects and those of the tiles.

    Args:
        whole: the annotations of the I images.
        boxes: (T, 4), the tiles.
        first: (I,) int64, the row of each image's first tile.
        counts: (I,) int64, the number of each image's tiles.
    """
    pairs = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
    image_rows = whole.image_rows
    for start in range(0, len(image_rows), _OBJECTS):
        rows = image_rows[start : start + _OBJECTS]
        repeats = counts[rows]
        objects = start + np.repeat(np.arange(len(rows)), repeats)
        # The tiles of each object's image, in order.
        tiles = np.arange(len(objects)) + np.repeat(first[rows] - np.cumsum(repeats) + repeats, repeats)
        overlap = (_sides(whole.xywh[objects], boxes[tiles, :2], boxes[tiles, 2:]) > 0).all(axis=1)
        pairs.append((objects[overlap], tiles[overlap]))
    objects, tiles = (np.concatenate(parts) for parts in zip(*pairs))
    return objects, tiles


def _sides(xywh: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Width and height (P, 2) of the parts of boxes (P, 4) from ``low`` (P, 2) to ``high`` (P, 2), at least 0."""
    return np.maximum(np.minimum(xywh[:, :2] + xywh[:, 2:], high) - np.maximum(xywh[:, :2], low), 0)
