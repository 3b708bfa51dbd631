"""Detection in tiles: detect in each tile of an image, and merge what was found to the detections of the image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.data.tiles import tile_grid
from cpm_rcnn.inference.to_host import to_host
from cpm_rcnn.models.nms import grouped_nms

# A detection is cut if its distance to an inner edge of its tile is at most this part of its longer side.
_NEAR = 0.1
# A cut detection is dropped for one that covers at least this part of it, with at least this part of its score.
_COVERED, _SCORE = 0.5, 0.5
_NMS_IOU = 0.5
# Pairs of detections that are compared at a time, which bounds the memory.
_PAIRS = 1 << 22


class TiledDetector:
    """Runs a detector on the overlapping tiles of images, and merges the detections of each image.

    An object in the overlap of two tiles is found in both, and in one of them maybe only a part of it. So

    1. a detection that an inner edge of its tile seems to cut (it ends beyond the edge, or before it by at most a tenth
       of its longer side) is dropped if a larger detection of its class in another tile covers at least half of it and
       has at least half of its score;
    2. of two detections of a class with an IoU above 0.5, the one with the lower score is dropped.

    Of an object that is larger than the overlap and whole in no tile, several parts may remain. An image that is one
    tile keeps its detections as they are.

    Args:
        detector: maps a list of uint8 (3, H, W) images of any size to one dict per image: ``boxes`` (N, 4) in xyxy
            pixels of the given image, ``scores`` (N,) and ``labels`` (N,), and optionally other columns (N,).
        tile: side of the tiles in pixels.
        overlap: smallest overlap of neighboring tiles as a part of their sides.
        convention: the box coordinate convention of the detector.
        batch_size: tiles per call of ``detector``.
        max_detections: maximum number of detections per image; None has no limit.
        progress: is called after each batch of tiles with the part of all tiles that is done, up to 1.
    """

    def __init__(
        self,
        detector: Callable[[Sequence[Tensor]], list[dict[str, Tensor]]],
        tile: int,
        overlap: float,
        convention: BoxConvention,
        batch_size: int,
        max_detections: int | None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.detector = detector
        self.tile = tile
        self.overlap = overlap
        self.convention = convention
        self.batch_size = batch_size
        self.max_detections = max_detections
        self.progress = progress

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detect objects in images of their original size.

        Args:
            images: uint8 (3, H, W), on the detector's device.

        Returns:
            One dict per image, on the CPU, best score first: ``boxes`` (N, 4) in pixels of that image, ``scores``
            (N,), ``labels`` (N,), and the other columns of the detector.
        """
        grids = [tile_grid(image.shape[1], image.shape[2], self.tile, self.overlap).tolist() for image in images]
        tiles = [image[:, y1:y2, x1:x2] for image, grid in zip(images, grids) for x1, y1, x2, y2 in grid]
        found: list[dict[str, Tensor]] = []
        for start in range(0, len(tiles), self.batch_size):
            found += self.detector(tiles[start : start + self.batch_size])
            if self.progress is not None:
                self.progress(len(found) / len(tiles))
        on_host = iter(to_host(found))
        return [self._merge([next(on_host) for _ in grid], torch.tensor(grid)) for grid in grids]

    def _merge(self, found: Sequence[dict[str, Tensor]], grid: Tensor) -> dict[str, Tensor]:
        """Merge the detections in the tiles (T, 4) of one image."""
        if len(found) == 1:
            return found[0]
        columns = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        tiles = torch.arange(len(found)).repeat_interleave(torch.tensor([len(each["scores"]) for each in found]))
        boxes = columns["boxes"] + grid[tiles, :2].repeat(1, 2)
        scores, labels = columns["scores"], columns["labels"]
        dropped = self._parts_of_others(boxes, scores, labels, tiles, grid)
        rows, _ = grouped_nms(boxes, scores, labels, _NMS_IOU, ~dropped)
        return {name: column[rows[: self.max_detections]] for name, column in (columns | {"boxes": boxes}).items()}

    def _parts_of_others(self, boxes: Tensor, scores: Tensor, labels: Tensor, tiles: Tensor, grid: Tensor) -> Tensor:
        """The detections (N,) bool that the first rule drops.

        Args:
            boxes: (N, 4) in pixels of the image.
            scores: (N,).
            labels: (N,).
            tiles: (N,) int64, the tile of each detection.
            grid: (T, 4) int64, the tiles; the last corner of the last one is that of the image.
        """
        width, height = self.convention.sizes(boxes)
        edges = grid[tiles]
        inner = torch.cat([edges[:, :2] > 0, edges[:, 2:] < grid[-1, 2:]], dim=1)
        before = torch.cat([boxes[:, :2] - edges[:, :2], edges[:, 2:] - self.convention.extra - boxes[:, 2:]], dim=1)
        cut = (inner & (before <= _NEAR * torch.maximum(width, height)[:, None])).any(dim=1)

        area = self.convention.area(boxes)
        dropped = torch.zeros_like(cut)
        for rows in cut.nonzero().squeeze(1).split(max(_PAIRS // max(len(boxes), 1), 1)):
            covered = self.convention.intersection(boxes[rows, None], boxes) >= _COVERED * area[rows, None]
            rival = (labels[rows, None] == labels) & (tiles[rows, None] != tiles) & (area[rows, None] < area)
            rival &= scores >= _SCORE * scores[rows, None]
            dropped[rows] = (covered & rival).any(dim=1)
        return dropped
