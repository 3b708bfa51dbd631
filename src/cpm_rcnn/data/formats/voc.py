"""PASCAL VOC: one XML file per image, with boxes in pixels that are counted from 1.

``xmin``, ``ymin``, ``xmax`` and ``ymax`` are the first and the last pixels inside the box. In COCO's terms, x = xmin -
1, y = ymin - 1, width = xmax - xmin + 1 and height = ymax - ymin + 1. Objects marked as difficult become crowds:
training ignores them, and evaluation counts them neither as found nor as missed.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element

from cpm_rcnn.data.formats.builder import RawBuilder
from cpm_rcnn.data.formats.image_sizes import read_size
from cpm_rcnn.data.formats.layout import (
    IMAGE_SUFFIXES,
    Layout,
    SplitFiles,
    files_in,
    image_folder,
    listed_lines,
    shown_path,
    split_folders,
    subfolders,
)
from cpm_rcnn.data.formats.xml import XMLFault, line_of, parse_xml, root_tag, text_of
from cpm_rcnn.data.raw import RawAnnotations
from cpm_rcnn.data.settings import Split
from cpm_rcnn.errors import UserError

# Usual names of the folder of XML files, in lower case.
_XML_FOLDERS = ("annotations", "annots", "xmls", "xml", "labels")


def find(root: Path) -> Layout | None:
    """The data set in VOC's format in ``root``; None if there is none.

    Its splits are folders named like splits, or the lists in ``ImageSets/Main``. Without either, all images are
    training images.
    """
    by_split = {split: _annotated(root, folder) for split, folder in split_folders(root).items()}
    in_folders = {split: folders for split, folders in by_split.items() if folders is not None}
    if in_folders:
        evidence = ", ".join(f"{shown_path(folders.xml, root)}/*.xml" for folders in in_folders.values())
        return Layout("voc", evidence, {split: _split(each, each.xml) for split, each in in_folders.items()})
    folders = _annotated(root, root)
    if folders is None:
        return None
    evidence = f"{shown_path(folders.xml, root)}/*.xml" if folders.xml != root else "*.xml"
    lists = _split_lists(root) or {"train": folders.xml}
    return Layout("voc", evidence, {split: _split(folders, path) for split, path in lists.items()})


@dataclass(frozen=True)
class _Folders:
    """The folder of a data set, of XML files in it, and of their images."""

    root: Path
    xml: Path
    images: Path


def _annotated(root: Path, folder: Path) -> _Folders | None:
    """The XML files of VOC in ``folder`` or in its usual subfolder, and their images."""
    named = subfolders(folder)
    for candidate in [*(named[name] for name in _XML_FOLDERS if name in named), folder]:
        if any(root_tag(candidate / name) == "annotation" for name in files_in(candidate, [".xml"])[:3]):
            return _Folders(root, candidate, image_folder(folder))
    return None


def _split_lists(root: Path) -> dict[Split, Path]:
    """The files in ``ImageSets/Main`` that list the images of a split."""
    # trainval is VOC's name of both parts together; CVAT writes default if it has no splits.
    names: dict[Split, tuple[str, ...]] = {
        "train": ("train", "trainval", "default"),
        "val": ("val",),
        "test": ("test",),
    }
    paths = {
        split: [root / "ImageSets" / "Main" / f"{name}.txt" for name in candidates]
        for split, candidates in names.items()
    }
    found = {split: [path for path in candidates if path.is_file()] for split, candidates in paths.items()}
    return {split: candidates[0] for split, candidates in found.items() if candidates}


def _split(folders: _Folders, path: Path) -> SplitFiles:
    """The split that ``path`` states: a list of names, or the folder of all XML files."""
    return SplitFiles(path, folders.images, lambda progress: _read(folders, path))


def _read(folders: _Folders, path: Path) -> RawAnnotations:
    """The annotations of one split.

    Raises:
        UserError: a list cannot be read, or no image is valid.
    """
    builder = RawBuilder(path)
    images = files_in(folders.images, IMAGE_SUFFIXES)
    image_of = {PurePosixPath(name).stem: name for name in reversed(images)}
    if path == folders.xml:
        stems = [PurePosixPath(name).stem for name in files_in(path, [".xml"])]
        annotated = set(stems)
        for name in images:
            if PurePosixPath(name).stem not in annotated:
                builder.notes.add("image", "images", "without an XML file, ignored", name)
    else:
        # VOC's lists of a single class have a second column.
        stems = list(dict.fromkeys(line.split()[0] for _, line in listed_lines(path)))
    for stem in stems:
        file = folders.xml / f"{stem}.xml"
        place = shown_path(file, folders.root)
        if not file.is_file():
            builder.faults.add("image", "images", "without an XML file", place)
            continue
        try:
            root = parse_xml(file)
            if root.tag != "annotation":
                raise XMLFault(f"line {line_of(root)}: the root is <{root.tag}>, not <annotation>")
            name = image_of.get(stem) or _other_name(root, stem, folders.images)
            builder.add_image(name, _size(root, folders.images, name), place, place)
        except XMLFault as error:
            builder.faults.add("file", "files", "that cannot be read", f"{place} {error}")
        except UserError as error:
            builder.faults.add("image", "images", "whose size is neither in the XML nor readable", f"{place}: {error}")
        else:
            for item in root.findall("object"):
                _add_object(builder, item, place)
    return builder.build()


def _other_name(root: Element, stem: str, images: Path) -> str:
    """The image of an annotation, if no image has its name: the one that it names, if that exists."""
    stated = PurePosixPath(text_of(root, "filename"))
    return stated.name if (images / stated.name).is_file() else f"{stem}{stated.suffix or '.jpg'}"


def _size(root: Element, images: Path, name: str) -> tuple[int, int]:
    """(height, width) in pixels, from the annotation, or from the image if the annotation lacks it, as some tools do.

    Raises:
        UserError: the image is missing or damaged.
    """
    sides = [text_of(root, f"size/{side}") for side in ("height", "width")]
    if all(side.isdecimal() and int(side) for side in sides):
        return int(sides[0]), int(sides[1])
    return read_size(images, name)


def _add_object(builder: RawBuilder, item: Element, place: str) -> None:
    name = text_of(item, "name")
    corners = [text_of(item, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    where = f"{place} line {line_of(item)}"
    if not name:
        builder.faults.add("object", "objects", "without a name", where)
        return
    try:
        x1, y1, x2, y2 = map(float, corners)
    except ValueError:
        values = ", ".join(map(repr, corners))
        builder.faults.add(
            "object", "objects", "whose xmin, ymin, xmax, ymax are not four numbers", f"{where}: {values}"
        )
        return
    if x1 == 0 or y1 == 0:
        builder.notes.add("box", "boxes", "from pixel 0, although VOC counts pixels from 1", where)
    if x2 < x1 or y2 < y1:
        values = ", ".join(f"{corner:g}" for corner in (x1, y1, x2, y2))
        builder.faults.add("object", "objects", "whose xmax or ymax is below xmin or ymin", f"{where}: {values}")
        return
    crowd = text_of(item, "difficult") == "1"
    builder.add_object(name, (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1), line_of(item), crowd)
