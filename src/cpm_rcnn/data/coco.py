"""COCO-style annotations: a json read once, checked, and handed on as arrays and training targets."""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpm_rcnn.data.batches import Sample
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.errors import UserError
from cpm_rcnn.pixels import PixelConvention

_log = logging.getLogger(__name__)


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
    def load(cls, path: str | Path, categories: Sequence[dict[str, Any]] | None = None) -> "CocoAnnotations":
        """Read and check a COCO-style json.

        Boxes of zero width or height, of which COCO's own ``instances_train2017.json`` has two, are kept but not
        usable, and a warning in the log names them.

        Args:
            path: the json.
            categories: those that a model already knows, each with ``id`` and ``name``. They set the labels, and the
                json may not have others.

        Raises:
            UserError: no such file, not COCO json, other categories than ``categories``, or images and annotations
                that contradict each other. One line with the file, the first ids concerned and their count.
        """
        path = Path(path)
        content = _read_json(path)
        listed = content.get("categories", [])
        _refuse(path, _category_problems(listed, categories))
        known = sorted(listed if categories is None else categories, key=lambda category: category["id"])
        category_ids = [int(category["id"]) for category in known]

        images, objects = content["images"], content.get("annotations", [])
        if not images:
            raise UserError(f"{path}: lists no images")
        _refuse(path, _problems(images, objects, set(category_ids)))
        image_ids = np.array([image["id"] for image in images], dtype=np.int64)
        heights = np.array([image["height"] for image in images], dtype=np.int64)
        widths = np.array([image["width"] for image in images], dtype=np.int64)

        rows = {image["id"]: row for row, image in enumerate(images)}
        image_rows = np.array([rows[item["image_id"]] for item in objects], dtype=np.int64)
        order = np.argsort(image_rows, kind="stable")
        image_rows = image_rows[order]
        label_of = {key: position + 1 for position, key in enumerate(category_ids)}
        labels = np.array([label_of[item["category_id"]] for item in objects], dtype=np.int64)[order]
        boxes = np.array([item["bbox"] for item in objects], dtype=np.float64).reshape(-1, 4)[order]
        areas = np.array([item.get("area", item["bbox"][2] * item["bbox"][3]) for item in objects], np.float32)
        crowds = np.array([bool(item.get("iscrowd", 0)) for item in objects], dtype=bool)[order]

        flat = (boxes[:, 2:] == 0).any(axis=1)
        if flat.any():
            names = _first([_name(objects[position]) for position in order[flat]])
            _log.warning("%s: %d boxes without area are left out of training (%s)", path, flat.sum(), names)
        limits = np.stack([widths, heights], axis=1)[image_rows]
        inside = np.minimum(boxes[:, :2] + boxes[:, 2:], limits) > np.maximum(boxes[:, :2], 0)
        return cls(
            path=path,
            image_ids=image_ids,
            file_names=np.array([image["file_name"] for image in images], dtype=str),
            heights=heights,
            widths=widths,
            category_ids=category_ids,
            category_names=[str(category["name"]) for category in known],
            has_annotations="annotations" in content,
            offsets=np.searchsorted(image_rows, np.arange(len(images) + 1)),
            labels=labels,
            xywh=boxes.astype(np.float32),
            areas=areas[order],
            crowds=crowds,
            usable=inside.all(axis=1) & ~crowds,
        )


class CocoDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images and targets of one split, at network size.

    Indexed by a :class:`~cpm_rcnn.data.batches.Sample`, it returns the image, (3, h, w) uint8 RGB, and its target:
    ``boxes`` (N, 4) float32 xyxy in pixels of that image, ``labels`` (N,) int64, ``image_id`` (int) and
    ``original_size`` (height, width) of the file. Targets hold the usable objects alone, clipped to the image.

    Args:
        annotations: of the split.
        images: where its files live.
        transform: takes image (3, H, W), boxes (N, 4) and the sample's number; returns both at network size.
        pixels: the convention of the boxes.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        images: ImageSource,
        transform: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
        pixels: PixelConvention,
    ) -> None:
        self.annotations = annotations
        self.images = images
        self.transform = transform
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, dict[str, Any]]:
        """The sample's image and target.

        Raises:
            UserError: the image cannot be read, or has another size than the json says.
        """
        listed, row = self.annotations, sample.image
        size = int(listed.heights[row]), int(listed.widths[row])
        file_name = str(listed.file_names[row])
        image = self.images.read(file_name)
        if tuple(image.shape[-2:]) != size:
            found = f"{image.shape[2]} x {image.shape[1]} pixels"
            expected = f"{size[1]} x {size[0]}"
            raise UserError(f"{self.images.path}: {file_name} is {found}, but {listed.path} says {expected}")

        objects = slice(listed.offsets[row], listed.offsets[row + 1])
        usable = listed.usable[objects]
        boxes = self.pixels.from_xywh(torch.from_numpy(listed.xywh[objects][usable]))
        boxes = self.pixels.clip(boxes, torch.tensor(size))
        image, boxes = self.transform(image, boxes, sample.number)
        # In the inclusive convention, a sliver under one pixel can turn negative when it is scaled.
        width, height = self.pixels.sizes(boxes)
        keep = (width > 0) & (height > 0)
        return image, {
            "boxes": boxes[keep],
            "labels": torch.from_numpy(listed.labels[objects][usable])[keep],
            "image_id": int(listed.image_ids[row]),
            "original_size": size,
        }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not json ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not COCO json (an object with images, annotations and categories)")
    for key in ["images"] + ["categories"] * ("annotations" in content):
        if key not in content:
            raise UserError(f"{path}: not COCO json (key {key!r} is missing)")
    for key in {"images", "annotations", "categories"} & content.keys():
        entries = content[key]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: not COCO json ({key!r} is not a list of objects)")
        for number, entry in enumerate(entries):
            if missing := _REQUIRED[key] - entry.keys():
                raise UserError(f"{path}: not COCO json ({key}[{number}] has no {min(missing)!r})")
    return content


_REQUIRED = {
    "images": {"id", "file_name", "height", "width"},
    "annotations": {"image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
}


def _category_problems(listed: list[dict[str, Any]], known: Sequence[dict[str, Any]] | None) -> dict[str, list[Any]]:
    """What is wrong with a json's categories, as in :func:`_problems`."""
    problems = defaultdict(list)
    seen = set()
    names = {category["id"]: category["name"] for category in known or ()}
    for category in listed:
        key = category["id"]
        if not _is_integer(key):
            problems["category ids that are no integers"].append(repr(key))
            continue
        if key in seen:
            problems["categories listed twice"].append(key)
        seen.add(key)
        if known is not None and names.get(key) != category["name"]:
            problems["categories that the model does not know by this id and name"].append(
                f"{key} {category['name']!r}"
            )
    return problems


def _problems(
    images: list[dict[str, Any]], objects: list[dict[str, Any]], category_ids: set[int]
) -> dict[str, list[Any]]:
    """What is wrong with images and annotations: each kind of fault, with the ids concerned."""
    problems = defaultdict(list)
    image_ids = set()
    for image in images:
        key = image["id"]
        if not _is_integer(key):
            problems["image ids that are no integers"].append(repr(key))
            continue
        if key in image_ids:
            problems["images listed twice"].append(key)
        image_ids.add(key)
        if not all(_is_integer(image[side]) and image[side] > 0 for side in ("height", "width")):
            problems["images without a height and width in whole pixels"].append(key)
    for item in objects:
        if not _is_integer(item["image_id"]) or item["image_id"] not in image_ids:
            problems["annotations of an unknown image"].append(f"{_name(item)} of image {item['image_id']}")
        if not _is_integer(item["category_id"]) or item["category_id"] not in category_ids:
            problems["annotations of an unknown category"].append(f"{_name(item)} of category {item['category_id']}")
        bbox = item["bbox"]
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_finite, bbox))):
            problems["annotations whose bbox is not four finite numbers"].append(_name(item))
        elif bbox[2] < 0 or bbox[3] < 0:
            problems["annotations whose bbox has a negative width or height"].append(_name(item))
        if not _is_finite(item.get("area", 0)):
            problems["annotations whose area is not a finite number"].append(_name(item))
    return problems


def _refuse(path: Path, problems: dict[str, list[Any]]) -> None:
    """Raise one line about all ``problems``, if there are any."""
    lines = [f"{len(names)} {kind} ({_first(names)})" for kind, names in problems.items() if names]
    if lines:
        raise UserError(f"{path}: {'; '.join(lines)}")


def _first(names: list[Any]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")


def _name(item: dict[str, Any]) -> str:
    return f"annotation {item.get('id', 'without id')}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    # Python's json reads integers of any length, and NaN and Infinity; the comparison sorts all of those out.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
