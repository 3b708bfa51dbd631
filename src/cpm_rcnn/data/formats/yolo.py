"""YOLO: one text file per image, with a line ``class x_center y_center width height`` per object.

Coordinates are fractions of the upright image's width and height, written with a few digits. The edges of boxes are
computed from them and rounded to 1/100 pixel, so that six digits recover boxes on whole pixels exactly in images of up
to 6000 pixels. A line with a class and three or more points is a polygon, and becomes the box around it. An image
without a text file, or with an empty one, has no objects.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cpm_rcnn.data.formats.builder import RawBuilder
from cpm_rcnn.data.formats.image_sizes import read_sizes
from cpm_rcnn.data.formats.layout import (
    SPLIT_NAMES,
    Layout,
    SplitFiles,
    files_in,
    image_folder,
    images_below,
    listed_lines,
    read_text,
    shown_path,
    split_folders,
    subfolders,
)
from cpm_rcnn.data.raw import RawAnnotations
from cpm_rcnn.data.settings import Split
from cpm_rcnn.errors import UserError

_CLASS_FILES = ("classes.txt", "obj.names", "labels/classes.txt")
# Fractions may leave 0..1 by this much: tools round them, and people draw a little over the border.
_MARGIN = 0.01
_DECIMALS = 2


def find(root: Path) -> Layout | None:
    """The data set in YOLO's format in ``root``; None if there is none.

    Its classes and splits are in ``data.yaml``, or in the only other yaml with class names. Without one, the classes
    are in ``classes.txt`` or ``obj.names``, and the splits are folders named like splits, in ``root`` or in its folder
    of images; without these, all images are training images.

    Raises:
        UserError: ``data.yaml`` is invalid, or there are labels, but no class names.
    """
    described = {path: content for path in _yaml_files(root) if "names" in (content := _read_yaml(path))}
    preferred = [path for path in described if path.stem == "data"] or list(described)
    if len(preferred) > 1:
        raise UserError(f"{root}: {', '.join(path.name for path in preferred)} all name classes; call one data.yaml")
    if preferred:
        return _described_layout(preferred[0], described[preferred[0]])
    file = next((root / name for name in _CLASS_FILES if (root / name).is_file()), None)
    if file is None:
        labels = subfolders(root).get("labels")
        if labels is not None and any(labels.rglob("*.txt")):
            raise UserError(f"{root}: has labels/ of YOLO's format, but no data.yaml or classes.txt with class names")
        return None
    data = _DataSet(file, root, dict(enumerate(name for _, name in listed_lines(file))))
    folders = split_folders(root) or split_folders(image_folder(root)) or {"train": image_folder(root)}
    return Layout("yolo", shown_path(file, root), {split: data.split([folder]) for split, folder in folders.items()})


def _yaml_files(root: Path) -> list[Path]:
    return [root / name for name in files_in(root, [".yaml", ".yml"])]


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a yaml; empty if it is something else.

    Raises:
        UserError: the file cannot be read, or is not valid YAML.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{where}: not valid YAML ({reason})") from None
    return content if isinstance(content, dict) else {}


def _described_layout(path: Path, content: Mapping[str, Any]) -> Layout:
    """The layout that ``data.yaml`` describes.

    Raises:
        UserError: it is invalid.
    """
    root = path.parent
    base = root / str(content.get("path") or "")
    data = _DataSet(path, root, _class_names(path, content), "kpt_shape" in content)
    splits: dict[Split, SplitFiles] = {}
    for split, names in SPLIT_NAMES.items():
        value = next((content[name] for name in names if content.get(name)), None)
        if value is None:
            continue
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{path}: {split} is neither a path nor a list of paths")
        splits[split] = data.stated_split(split, base, entries)
    if not splits:
        raise UserError(f"{path}: has no train, val or test with the paths of images")
    return Layout("yolo", path.name, splits)


def _class_names(path: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """From class ids to names.

    Raises:
        UserError: ``names`` is invalid or does not fit ``nc``.
    """
    names = content["names"]
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(numbered, dict) or not numbered:
        raise UserError(f"{path}: names is neither a list of class names nor a mapping from class ids to names")
    for key, name in numbered.items():
        if type(key) is not int or key < 0 or isinstance(name, (list, dict)) or name is None:
            raise UserError(f"{path}: names has {key!r}: {name!r}, but maps class ids from 0 to names")
    if len(set(map(str, numbered.values()))) < len(numbered):
        raise UserError(f"{path}: names has the same name for several classes")
    if content.get("nc", len(numbered)) != len(numbered):
        raise UserError(f"{path}: nc is {content['nc']}, but names has {len(numbered)}")
    return {key: str(name) for key, name in sorted(numbered.items())}


@dataclass(frozen=True)
class _DataSet:
    """What the splits of a data set share.

    Attributes:
        path: the file with the class names.
        root: its folder.
        names: from class ids to names.
        keypoints: whether a line continues with the keypoints of the object after its box.
    """

    path: Path
    root: Path
    names: Mapping[int, str]
    keypoints: bool = False

    def stated_split(self, split: Split, base: Path, entries: Sequence[str]) -> SplitFiles:
        """The split of the folders and list files that ``data.yaml`` names.

        Args:
            split: its name.
            base: the folder that paths start from.
            entries: the paths.
        """
        found = []
        for entry in entries:
            # Roboflow writes ../train/images for a folder beside data.yaml.
            candidates = [folder / name for name in (entry, entry.removeprefix("../")) for folder in (base, self.root)]
            path = next((candidate for candidate in candidates if candidate.exists()), None)
            if path is None:
                tried = " and ".join(dict.fromkeys(os.path.normpath(each) for each in candidates))
                absent = f"{self.path}: {split} names {entry}, but there is no {tried}"
                return SplitFiles(self.path, self.root, _unreadable, absent)
            found.append(Path(os.path.normpath(path)))
        return self.split(found)

    def split(self, sources: Sequence[Path]) -> SplitFiles:
        """The split of the images in some folders, and of those that some text files list."""
        listed = {source: _listed_images(source) for source in sources if source.is_file()}
        places = [source for source in sources if source not in listed]
        places += [path.parent for paths in listed.values() for path in paths]
        inside = all(place.is_relative_to(self.root) for place in places)
        folder = self.root if inside else Path(os.path.commonpath(places))

        def read(progress: bool) -> RawAnnotations:
            origins = {path: origin for paths in listed.values() for path, origin in paths.items()}
            paths = [path for source in sources for path in listed.get(source) or images_below(source)]
            if not paths:
                raise UserError(f"{', '.join(map(str, sources))}: has no images")
            return self._read(folder, paths, origins, progress)

        return SplitFiles(self.path, folder, read)

    def _read(self, folder: Path, paths: Sequence[Path], origins: Mapping[Path, str], progress: bool) -> RawAnnotations:
        """The annotations of some images.

        Args:
            folder: the folder that their names start from.
            paths: the images.
            origins: where images are listed.
            progress: show a progress bar.

        Raises:
            UserError: no image can be read, or none has a label file.
        """
        builder = RawBuilder(self.path)
        names = [path.relative_to(folder).as_posix() for path in paths]
        labels = [self._label_file(path) for path in paths]
        existing = {parent: set(files_in(parent, [".txt"])) for parent in {p.parent for p in labels} if parent.is_dir()}
        labeled = [label.name in existing.get(label.parent, ()) for label in labels]
        if not any(labeled):
            raise UserError(f"{self.path}: no image has a label file; expected for example {labels[0]} for {paths[0]}")
        sizes = read_sizes(folder, names, progress)
        for path, name, size, label, has_label in zip(paths, names, sizes, labels, labeled, strict=True):
            if isinstance(size, str):
                origin = f", {origins[path]}" if path in origins else ""
                builder.faults.add("image", "images", "that cannot be read", f"{size}{origin}")
                continue
            place = shown_path(label, self.root)
            builder.add_image(name, size, name, place)
            if has_label:
                self._add_objects(builder, label, size, place)
            else:
                builder.notes.add("image", "images", "without a label file, taken as without objects", name)
        for parent in existing.keys() - {path.parent for path in paths}:
            used = {label.name for label in labels if label.parent == parent} | {"classes.txt"}
            for name in sorted(existing[parent] - used):
                builder.notes.add("label file", "label files", "without an image", shown_path(parent / name, self.root))
        return builder.build(list(self.names.values()))

    def _label_file(self, image: Path) -> Path:
        """The text file of an image: in ``labels`` instead of the last ``images`` of its path, or beside it."""
        start = len(self.root.parts) if image.is_relative_to(self.root) else 0
        parts = list(image.parts)
        for position in range(len(parts) - 2, start - 1, -1):
            if parts[position] == "images":
                parts[position] = "labels"
                break
        return Path(*parts).with_suffix(".txt")

    def _add_objects(self, builder: RawBuilder, file: Path, size: tuple[int, int], place: str) -> None:
        """Add the objects of a label file to the last image."""
        try:
            text = read_text(file)
        except UserError as error:
            builder.faults.add("label file", "label files", "that cannot be read", str(error))
            return
        for number, line in enumerate(text.splitlines(), start=1):
            values = line.split()
            if not values:
                continue
            where = f"{place} line {number}"
            try:
                label, *numbers = map(float, values)
            except ValueError:
                builder.faults.add(
                    "label", "labels", "with a value that is not a number", f"{where}: {line.strip()[:60]}"
                )
                continue
            if self.keypoints:
                numbers = numbers[:4]
            if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
                what = "without a box of 4 numbers or a polygon after the class"
                builder.faults.add("label", "labels", what, f"{where}: {len(values)} values")
            elif label not in self.names:
                what = f"with a class id that {self.path.name} does not name"
                builder.faults.add("label", "labels", what, f"{where}: {values[0]}")
            elif not all(-_MARGIN <= value <= 1 + _MARGIN for value in numbers):
                what = "with numbers that are not fractions of the image, from 0 to 1"
                builder.faults.add("label", "labels", what, f"{where}: {line.strip()[:60]}")
            else:
                builder.add_object(self.names[int(label)], _to_xywh(numbers, size), number)


def _listed_images(path: Path) -> dict[Path, str]:
    """The images that a text file lists, from its own folder, and where it does.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    return {
        Path(os.path.normpath(path.parent / line)): f"{path.name} line {number}" for number, line in listed_lines(path)
    }


def _unreadable(progress: bool) -> RawAnnotations:
    raise AssertionError("an absent split is not read")


def _to_xywh(numbers: Sequence[float], size: tuple[int, int]) -> list[float]:
    """x, y, width, height in pixels from fractions of (height, width): a center, width and height, or three points."""
    height, width = size
    if len(numbers) == 4:
        x, y, w, h = numbers
        edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    else:
        xs, ys = numbers[0::2], numbers[1::2]
        edges = (min(xs), min(ys), max(xs), max(ys))
    # Adding 0 makes 0 of -0.
    x1, y1, x2, y2 = (round(edge * side, _DECIMALS) + 0.0 for edge, side in zip(edges, (width, height) * 2))
    return [x1, y1, round(x2 - x1, _DECIMALS), round(y2 - y1, _DECIMALS)]
