"""CVAT for images 1.1: one ``annotations.xml`` with the images and objects of a task or project.

Coordinates are pixels counted from 0, and the box ends where its last pixel ends, as in COCO's format: x = xtl, y =
ytl, width = xbr - xtl and height = ybr - ytl. Polygons, masks, ellipses and rotated boxes become the boxes around them.
Other shapes are not used.
"""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from xml.etree.ElementTree import Element

from cpm_rcnn.data.formats.builder import RawBuilder
from cpm_rcnn.data.formats.image_sizes import read_size
from cpm_rcnn.data.formats.layout import Layout, SplitFiles, image_folder, split_folders, split_of
from cpm_rcnn.data.formats.xml import XMLFault, line_of, parse_xml, root_tag, text_of
from cpm_rcnn.data.raw import RawAnnotations
from cpm_rcnn.data.settings import Split
from cpm_rcnn.errors import UserError

_FILE = "annotations.xml"


def find(root: Path) -> Layout | None:
    """The data set in CVAT's format in ``root``; None if there is none.

    Its splits are folders named like splits with an ``annotations.xml`` each, or the subsets of one. Without either,
    all images are training images.

    Raises:
        UserError: subsets cannot be assigned to splits.
    """
    files = {split: folder / _FILE for split, folder in split_folders(root).items() if _is_annotated(folder)}
    if files:
        evidence = ", ".join(f"{path.parent.name}/{_FILE}" for path in files.values())
        return Layout("cvat", evidence, {split: _split(path) for split, path in files.items()})
    if not _is_annotated(root):
        return None
    path = root / _FILE
    by_split: dict[Split, set[str]] = {}
    for subset in (subsets := _subsets(path)):
        by_split.setdefault(split_of(subset) or "train", set()).add(subset)
    unknown = sorted(subset for subset in subsets if split_of(subset) is None)
    if unknown and len(unknown) < len(subsets):
        raise UserError(f"{path}: subset {unknown[0]!r}: must be named train, validation or test")
    return Layout("cvat", _FILE, {split: _split(path, chosen) for split, chosen in by_split.items()})


def _is_annotated(folder: Path) -> bool:
    return (folder / _FILE).is_file() and root_tag(folder / _FILE) == "annotations"


def _subsets(path: Path) -> set[str]:
    """The values of the attribute ``subset`` of all images, "" for images without; found without parsing the file."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    tags = re.findall(r"<image\s[^>]*>", text)
    found = [re.search(r"\ssubset=[\"']([^\"']*)[\"']", tag) for tag in tags]
    return {"" if match is None else match[1] for match in found} or {""}


def _split(path: Path, subsets: set[str] | None = None) -> SplitFiles:
    """The split of all images of ``path``, or of those in some of its subsets."""
    images = image_folder(path.parent)
    return SplitFiles(path, images, lambda progress: _read(path, images, subsets))


def _read(path: Path, images: Path, subsets: set[str] | None) -> RawAnnotations:
    """The annotations of one split.

    Raises:
        UserError: the file is not well-formed, is in CVAT's format for videos, or has no valid image.
    """
    try:
        root = parse_xml(path)
    except XMLFault as error:
        raise UserError(f"{path} {error}") from None
    if root.find("track") is not None:
        raise UserError(f"{path}: is in the format 'CVAT for video'; export it as 'CVAT for images 1.1'")
    # Labels with a parent are those of a skeleton's points.
    labels = [text_of(label, "name") for label in root.iterfind("meta//labels/label") if label.find("parent") is None]
    builder = RawBuilder(path)
    for image in root.iterfind("image"):
        if subsets is None or image.get("subset", "") in subsets:
            _add_image(builder, image, images, set(labels))
    return builder.build(list(dict.fromkeys(labels)) or None)


def _add_image(builder: RawBuilder, image: Element, images: Path, labels: set[str]) -> None:
    """Add an image and its objects."""
    name, subset = image.get("name", ""), image.get("subset", "")
    if subset and not (images / name).is_file() and (images / subset / name).is_file():
        name = f"{subset}/{name}"
    sides = [image.get(side, "") for side in ("height", "width")]
    place = f"line {line_of(image)}"
    try:
        known = all(side.isdecimal() and int(side) for side in sides)
        size = (int(sides[0]), int(sides[1])) if known else read_size(images, name)
    except UserError as error:
        builder.faults.add("image", "images", "whose size is neither in the XML nor readable", f"{place}: {error}")
        return
    builder.add_image(name, size, place)
    for shape in image:
        if shape.tag in _SHAPES:
            _add_object(builder, shape, labels)
        elif shape.tag != "tag":
            builder.notes.add("shape", "shapes", "without a box, ignored", f"line {line_of(shape)}: {shape.tag}")


def _add_object(builder: RawBuilder, shape: Element, labels: set[str]) -> None:
    label, place = shape.get("label", ""), f"line {line_of(shape)}"
    if not label or (labels and label not in labels):
        builder.faults.add("object", "objects", "with a label that <meta> does not list", f"{place}: {label!r}")
        return
    try:
        points = list(_SHAPES[shape.tag](shape))
        xs, ys = zip(*points)
    except (KeyError, ValueError):
        builder.faults.add("object", "objects", "without valid coordinates", f"{place}: {shape.tag}")
        return
    builder.add_object(label, (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)), line_of(shape))


_Points = Iterable[tuple[float, float]]


def _box(shape: Element) -> _Points:
    x1, y1, x2, y2 = (float(shape.attrib[name]) for name in ("xtl", "ytl", "xbr", "ybr"))
    return _rotated(shape, [(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def _polygon(shape: Element) -> _Points:
    for pair in shape.attrib["points"].split(";"):
        x, y = map(float, pair.split(","))
        yield x, y


def _ellipse(shape: Element) -> _Points:
    x, y, rx, ry = (float(shape.attrib[name]) for name in ("cx", "cy", "rx", "ry"))
    angle = math.radians(float(shape.get("rotation", 0)))
    dx, dy = (math.hypot(a * math.cos(angle), b * math.sin(angle)) for a, b in ((rx, ry), (ry, rx)))
    return [(x - dx, y - dy), (x + dx, y + dy)]


def _mask(shape: Element) -> _Points:
    x, y, width, height = (float(shape.attrib[name]) for name in ("left", "top", "width", "height"))
    return [(x, y), (x + width, y + height)]


def _rotated(shape: Element, corners: list[tuple[float, float]]) -> _Points:
    """Corners of a box, turned clockwise around its center by its attribute ``rotation`` in degrees."""
    angle = math.radians(float(shape.get("rotation", 0)))
    if not angle:
        return corners
    (x1, y1), (x2, y2) = corners[0], corners[2]
    x, y, cos, sin = (x1 + x2) / 2, (y1 + y2) / 2, math.cos(angle), math.sin(angle)
    return [(x + (a - x) * cos - (b - y) * sin, y + (a - x) * sin + (b - y) * cos) for a, b in corners]


# From a shape to points that have the same box around them.
_SHAPES: dict[str, Callable[[Element], _Points]] = {
    "box": _box,
    "polygon": _polygon,
    "ellipse": _ellipse,
    "mask": _mask,
}
