"""Data sets in the formats that annotation tools write: where their splits are, and how they are read.

Each format is a module with a function ``find``, which looks for a data set in a folder and returns its
:class:`~cpm_rcnn.data.formats.layout.Layout`, or None. What a reader returns is checked like a COCO json
(:meth:`CocoAnnotations.check <cpm_rcnn.data.CocoAnnotations.check>`). None of the modules imports torch.
"""

from collections import Counter
from pathlib import Path

from cpm_rcnn.data.formats import coco, cvat, voc, yolo
from cpm_rcnn.data.formats.layout import Layout
from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.remote.urls import Location, Url

_FINDERS = {"coco": coco.find, "yolo": yolo.find, "voc": voc.find, "cvat": cvat.find}
_EXPECTED = {
    "coco": "annotations/*.json with images/, or train/_annotations.coco.json",
    "yolo": "data.yaml with images/ and labels/",
    "voc": "Annotations/*.xml with JPEGImages/, or *.xml beside the images",
    "cvat": "annotations.xml with images/",
}


def find_layout(root: Location, name: str = "auto") -> Layout:
    """The data set in a folder.

    Args:
        root: the folder, which must be local.
        name: its format, or ``auto``.

    Raises:
        ArgumentError: there is no such folder, no data set in this format in it, or with ``auto`` several.
        UserError: a file that describes the layout is invalid.
    """
    if isinstance(root, Url):
        raise ArgumentError(
            "root",
            f"={root}: remote folders are not searched for data sets; name the COCO-style jsons and the images of the "
            "splits, train_json=FILE.json train_images=FOLDER_OR_ZIP val_json=FILE.json val_images=FOLDER_OR_ZIP",
        )
    if not root.is_dir():
        raise ArgumentError("root", f"={root}: {'is a file, not a folder' if root.exists() else 'no such folder'}")
    if name != "auto":
        layout = _FINDERS[name](root)
        if layout is None:
            raise ArgumentError("format", f"={name}: no {_EXPECTED[name]} in {root}, which has {_contents(root)}")
        return layout
    found = [layout for find in _FINDERS.values() if (layout := find(root)) is not None]
    if len(found) > 1:
        formats = " and ".join(f"{layout.format} ({layout.evidence})" for layout in found)
        raise ArgumentError(
            "root", f"={root}: has data sets in several formats, {formats}; choose one with format=NAME"
        )
    if not found:
        expected = "; ".join(f"{name}: {files}" for name, files in _EXPECTED.items())
        raise ArgumentError("root", f"={root}: no data set in a known format ({expected}); it has {_contents(root)}")
    return found[0]


def _contents(root: Path) -> str:
    """What is in a folder, for messages: its folders, and the numbers of files by suffix."""
    entries = sorted(root.iterdir())
    folders = [f"{entry.name}/" for entry in entries if entry.is_dir()]
    suffixes = Counter(entry.suffix.lower() or "other" for entry in entries if not entry.is_dir())
    parts = folders[:5] + ["..."] * (len(folders) > 5) + [f"{count} {name}" for name, count in suffixes.most_common(4)]
    return ", ".join(parts) or "nothing"
