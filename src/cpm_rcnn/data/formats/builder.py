"""Annotations that a reader collects image by image, each with the file and line that it stands in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpm_rcnn.data.raw import ProblemCollector, RawAnnotations
from cpm_rcnn.errors import UserError


class RawBuilder:
    """Collects the images and objects of one split; ids are numbered from 1 in the order of the calls.

    Args:
        path: the file or folder that states which images the split has.

    Attributes:
        faults: errors in what was read; what they are about is not added.
        notes: what is valid but unusual.
    """

    def __init__(self, path: Path) -> None:
        self.faults = ProblemCollector()
        self.notes = ProblemCollector()
        self._path = path
        self._images: list[dict[str, Any]] = []
        self._image_places: list[str] = []
        self._sources: list[str] = []
        self._objects: list[dict[str, Any]] = []
        self._class_names: list[str] = []

    def add_image(self, file_name: str, size: tuple[int, int], place: str, source: str = "") -> None:
        """Add an image; the objects that are added after it are in it.

        Args:
            file_name: name from the folder of the images.
            size: (height, width) in pixels.
            place: what messages call it.
            source: the file that its objects are in, for messages; empty if it is the builder's path.
        """
        height, width = size
        entry = {"id": len(self._images) + 1, "file_name": file_name, "height": height, "width": width}
        self._images.append(entry)
        self._image_places.append(place)
        self._sources.append(f"{source} " if source else "")

    def add_object(self, class_name: str, bbox: Sequence[float], line: int, crowd: bool = False) -> None:
        """Add an object to the last image.

        Args:
            class_name: its class.
            bbox: x, y, width and height in pixels.
            line: its line in the source of the image.
            crowd: whether training and evaluation ignore it.
        """
        self._objects.append({"image_id": len(self._images), "bbox": list(bbox), "iscrowd": int(crowd), "line": line})
        self._class_names.append(class_name)

    def build(self, class_names: Sequence[str] | None = None) -> RawAnnotations:
        """All that was added.

        Args:
            class_names: the classes, in order. None for those of the objects, in alphabetical order.

        Raises:
            UserError: no image was added.
        """
        faults = self.faults.problems()
        if not self._images:
            raise UserError(
                f"{self._path}: {'; '.join(['no image is valid', *map(str, faults)] if faults else ['has no image'])}"
            )
        names = sorted(set(self._class_names)) if class_names is None else class_names
        class_ids = {name: number for number, name in enumerate(names, start=1)}
        for entry, name in zip(self._objects, self._class_names):
            entry["category_id"] = class_ids[name]
        content = {
            "images": self._images,
            "annotations": self._objects,
            "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        }
        return RawAnnotations(
            self._path, content, self._image_places.__getitem__, self._object_place, faults, self.notes.problems()
        )

    def _object_place(self, row: int) -> str:
        entry = self._objects[row]
        return f"{self._sources[entry['image_id'] - 1]}line {entry['line']}"
