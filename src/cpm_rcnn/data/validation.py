"""Checks of a COCO-style json file, which report all its errors by kind and id."""

import json
import os
import reprlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from numbers import Integral
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from cpm_rcnn.data.classes import ClassSelection, match_categories
from cpm_rcnn.data.problem import PLACES, Problem, counted
from cpm_rcnn.errors import ArgumentError, UserError, check_list
from cpm_rcnn.remote.files import local_copy
from cpm_rcnn.remote.urls import Location, Url

# In pixels. No image format allows more, and arithmetic with smaller numbers does not overflow.
_LONGEST_SIDE = 10**6
_LARGEST_NUMBER = 1e15
# File names are stored in an array whose items are as wide as the longest name.
_LONGEST_NAME = 1000


@dataclass(frozen=True, eq=False)
class CheckedJson:
    """The columns of a json's I images and A annotations, and which entries are valid.

    Rows are positions in the json's lists. The values of invalid entries are placeholders.

    Attributes:
        image_ids: (I,) int64.
        file_names: I strings; those of valid images are relative paths inside the image folder.
        heights: (I,) int64 pixels.
        widths: (I,) int64 pixels.
        good_images: (I,) bool.
        image_rows: (A,) int64, the row of each annotation's image.
        category_ids: (A,) int64, as the model numbers them.
        boxes: (A, 4) float64, x, y, width, height in pixels; those of valid annotations overlap or touch their image.
        areas: (A,) float64 square pixels; the area of the box if the json has none.
        crowds: (A,) bool.
        good_objects: (A,) bool; their images may be invalid.
        left_out: (A,) bool, the annotations of classes that are not selected.
        listed_ids: int64, the ids of the categories that the json lists, as the model numbers them.
        notes: what is valid but unusual.
        faults: errors in images and annotations.
        fatal: errors of the whole file, which cannot be corrected by skipping entries; a phrase each.
    """

    image_ids: np.ndarray
    file_names: list[str]
    heights: np.ndarray
    widths: np.ndarray
    good_images: np.ndarray
    image_rows: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray
    good_objects: np.ndarray
    left_out: np.ndarray
    listed_ids: np.ndarray
    notes: list[Problem]
    faults: list[Problem]
    fatal: list[str]


def read_json(path: Location) -> dict[str, Any]:
    """The content of a COCO-style json: an object whose ``images``, ``annotations`` and ``categories`` are lists.

    A file without ``annotations`` may also omit ``categories``. NaN and Infinity are accepted, as Python writes them.

    Raises:
        UserError: the file cannot be read, is not valid JSON, or has another structure.
        UnavailableError: the server of a remote file refuses or does not answer.
    """
    file = local_copy(path) if isinstance(path, Url) else path
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError:
        raise UserError(f"{path}: not a COCO annotation file (lists or objects nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a COCO annotation file (not an object with images, annotations and categories)")
    required = ["images"] + ["categories"] * ("annotations" in content)
    wrong = [f"key {key!r} is missing" for key in required if key not in content]
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key, []), list):
            wrong.append(f"{key!r} is not a list of objects")
    if content.get("images") == []:
        wrong.append("'images' is empty")
    if content.get("categories") == [] and content.get("annotations"):
        wrong.append("'categories' is empty, but each annotation needs one")
    wrong += [
        f"the ids of all {key} are strings (the first is {reprlib.repr(ids[0])}), but must be integers; "
        f"number the {key} and use the numbers in {reference}"
        for key, reference in (("images", "image_id"), ("categories", "category_id"))
        if not wrong and (ids := _string_ids(content.get(key, [])))
    ]
    if wrong:
        raise UserError(f"{path}: not a COCO annotation file ({', '.join(wrong)})")
    return content


def _string_ids(entries: list[Any]) -> list[str]:
    """The ids of ``entries`` if all of them are strings, otherwise an empty list."""
    ids = [entry["id"] for entry in entries if isinstance(entry, dict) and _is_string(entry.get("id"))]
    return ids if len(ids) == len(entries) else []


def check_json(
    content: dict[str, Any],
    known: Sequence[dict[str, Any]] | None = None,
    folder: Path | None = None,
    classes: ClassSelection | None = None,
    image_name: Callable[[int], str] | None = None,
    object_name: Callable[[int], str] | None = None,
) -> CheckedJson:
    """Check every entry of a json.

    Args:
        content: from :func:`read_json`.
        known: the only categories that annotations may have, each with ``id`` and ``name``; None allows those of the
            json. Those of the json are found among them by their names
            (:func:`~cpm_rcnn.data.classes.match_categories`).
        folder: where the images are. Absolute file names inside it become relative to it; without a folder, absolute
            file names are faults.
        classes: the selected classes; annotations of others are left out. None selects all.
        image_name: what messages call an image, by its row; None calls it by its id.
        object_name: the same for an annotation.
    """
    categories = _Entries("categories", "category", content.get("categories", []))
    matching = _check_categories(categories, known, classes)

    images = _Entries("images", "image", content["images"], image_name)
    image_ids, identified = images.ids()
    file_names, named = images.column(
        "file_name", _is_file_name, f"file_name is not a string of 1 to {_LONGEST_NAME} printable characters", ""
    )
    if folder is not None:
        file_names = _relative_names(file_names, folder)
    outside_folder = np.array([_leaves_folder(name) for name in file_names], dtype=bool)
    images.fault("whose file_name leaves the image folder", named & outside_folder, "file_name")
    sides = [
        images.column(key, _is_side, f"{key} in pixels is not an integer from 1 to {_LONGEST_SIDE}", 1)
        for key in ("height", "width")
    ]
    heights, widths = (np.array(values, dtype=np.int64) for values, _ in sides)
    sized = sides[0][1] & sides[1][1]

    objects = _Entries("annotations", "annotation", content.get("annotations", []), object_name)
    objects.ids(optional=True)
    values, accepted = objects.column("image_id", _is_integer, "image_id is not an integer", 0)
    image_rows = _rows_of(np.array(values, dtype=np.int64), image_ids, np.flatnonzero(identified))
    placed = accepted & (image_rows >= 0)
    objects.fault("of an unknown image", accepted & ~placed, "image_id")
    values, accepted = objects.column("category_id", _is_integer, "category_id is not an integer", 0)
    object_categories, category_rows, categorized = matching.translate(np.array(values, dtype=np.int64))
    left_out = accepted & ~categorized & (category_rows >= 0) & (classes is not None)
    objects.fault("of an unknown category", accepted & ~categorized & ~left_out, "category_id")
    notes: list[Problem] = []
    if classes is None:
        # Some tools list categories that no annotation has, for example a common parent of all others.
        unused = matching.foreign & ~np.isin(np.arange(len(matching.foreign)), category_rows[accepted])
        notes += _unused_categories(categories, unused)
        categories.fault("that the model does not know by its name", matching.foreign & ~unused, "name")
        if object_name is None:  # other formats have no ids
            notes += _renumbered_categories(categories, matching)

    values, boxed = objects.column("bbox", _is_box, "bbox is not four finite numbers", [0, 0, 0, 0])
    boxes = np.fromiter(chain.from_iterable(values), np.float64, 4 * len(values)).reshape(-1, 4)
    boxed &= ~objects.fault("whose bbox has a negative width or height", boxed & (boxes[:, 2:] < 0).any(axis=1), "bbox")
    limits = np.zeros((len(boxes), 2))
    comparable = boxed & placed
    comparable[comparable] = sized[image_rows[comparable]]
    limits[comparable] = np.stack([widths, heights], axis=1)[image_rows[comparable]]
    ends = boxes[:, :2] + boxes[:, 2:]
    outside = ((boxes[:, :2] > limits) | (ends < 0)).any(axis=1)
    objects.fault("whose bbox lies outside its image", comparable & outside, "bbox")

    values, _ = objects.column("area", _is_area, "area is not a finite number of at least 0", None, optional=True)
    areas = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    values, _ = objects.column("iscrowd", _is_flag, "iscrowd is neither 0 nor 1", 0, optional=True)

    # Boxes that have no area or only touch the image from outside.
    flat = objects.good & comparable & (np.minimum(ends, limits) <= np.maximum(boxes[:, :2], 0)).any(axis=1)
    return CheckedJson(
        image_ids=image_ids,
        file_names=file_names,
        heights=heights,
        widths=widths,
        good_images=images.good,
        image_rows=image_rows,
        category_ids=object_categories,
        boxes=boxes,
        areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
        crowds=np.array(values, dtype=bool),
        good_objects=objects.good,
        left_out=left_out,
        listed_ids=matching.model_ids[matching.identified & ~matching.foreign],
        notes=[*_flat_boxes(objects, flat), *notes],
        faults=images.faults + objects.faults,
        fatal=[
            *map(str, categories.faults),
            *_corner_boxes(boxes[comparable], limits[comparable]),
            *_normalized_boxes(boxes[comparable], limits[comparable]),
        ],
    )


def check_categories(argument: str, categories: Any) -> None:
    """Raise :class:`ArgumentError` unless ``categories`` is a list of mappings with an integer id and a name each."""
    check_list(argument, categories)
    for k, category in enumerate(categories):
        if not isinstance(category, Mapping) or not {"id", "name"} <= set(category):
            raise ArgumentError(f"{argument}[{k}]", f"={category}: must be a mapping with id and name")
        if isinstance(category["id"], bool) or not isinstance(category["id"], Integral):
            raise ArgumentError(f"{argument}[{k}].id", f"={category['id']!r}: must be an integer")
        if not _is_string(category["name"]):
            raise ArgumentError(f"{argument}[{k}].name", f"={category['name']!r}: must be a string")
    if len({category["id"] for category in categories}) < len(categories):
        raise ArgumentError(argument, ": several have the same id")


@dataclass(frozen=True, eq=False)
class _CategoryMatching:
    """The C categories of a json, and what the model calls them.

    Attributes:
        ids: (C,) int64.
        identified: (C,) bool, which ids are valid.
        model_ids: (C,) int64, the ids that the model has for them.
        foreign: (C,) bool, which ones it does not know.
        known_ids: int64, all ids that the model knows.
    """

    ids: np.ndarray
    identified: np.ndarray
    model_ids: np.ndarray
    foreign: np.ndarray
    known_ids: np.ndarray

    @property
    def renumbered(self) -> np.ndarray:
        """(C,) bool, the known categories that have another id in the model."""
        return self.identified & ~self.foreign & (self.ids != self.model_ids)

    def translate(self, object_categories: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """From ids of the json (A,) int64 to ids of the model.

        Returns:
            (A,) int64, the ids of the model; (A,) int64, the row of each category, or -1 if the json does not list it;
            and (A,) bool, which ones the model knows.
        """
        rows = _rows_of(object_categories, self.ids, np.flatnonzero(self.identified))
        known = (rows >= 0) & ~np.append(self.foreign, True)[rows]
        translated = np.where(known, np.append(self.model_ids, 0)[rows], object_categories)
        if not self.renumbered.any():
            known |= (rows < 0) & np.isin(object_categories, self.known_ids)
        return translated, rows, known


def _check_categories(
    categories: "_Entries", known: Sequence[dict[str, Any]] | None, classes: ClassSelection | None
) -> _CategoryMatching:
    """Record the faults of ``categories`` and find them among ``known``; None for those of the json itself."""
    ids, identified = categories.ids()
    names, named = categories.column("name", _is_string, "name is not a string", "")
    if known is None:
        first: dict[str, int] = {}
        repeated = [valid and first.setdefault(name, k) != k for k, (name, valid) in enumerate(zip(names, named))]
        categories.fault("with the name of an earlier category", np.array(repeated, dtype=bool), "name")
        return _CategoryMatching(ids, identified, ids, np.zeros(len(ids), dtype=bool), ids[identified])
    model_ids, found = match_categories(ids, names, known, classes)
    known_ids = np.array([category["id"] for category in known], dtype=np.int64)
    return _CategoryMatching(ids, identified, model_ids, identified & named & ~found, known_ids)


def _unused_categories(categories: "_Entries", unused: np.ndarray) -> list[Problem]:
    """The categories under ``unused`` (C,) bool, if there are any."""
    if not unused.any():
        return []
    count = counted(unused.sum(), "category", "categories")
    return [categories.problem(f"ignored {count} unknown to the model that no annotation has", unused, "name")]


def _renumbered_categories(categories: "_Entries", matching: _CategoryMatching) -> list[Problem]:
    """The categories that have another id in the model, if there are any."""
    rows = np.flatnonzero(matching.renumbered)
    if not len(rows):
        return []
    count = counted(len(rows), "category", "categories")
    matched = categories.problem(f"matched {count} with another id by name", matching.renumbered, "name")
    ids = f"{', '.join(map(str, matching.model_ids[rows[:3]]))}{', ...' * (len(rows) > 3)}"
    return [Problem(f"{matched}; detections have the model's ids, {ids}", len(rows))]


def _flat_boxes(objects: "_Entries", flat: np.ndarray) -> list[Problem]:
    """The annotations under ``flat`` (A,) bool, if there are any."""
    if not flat.any():
        return []
    return [objects.problem(f"ignored in training: {counted(flat.sum(), 'box', 'boxes')} without area", flat)]


def _corner_boxes(boxes: np.ndarray, limits: np.ndarray) -> list[str]:
    """One phrase if ``boxes`` (N, 4) fit into images of ``limits`` (N, 2), each (width, height), only as xyxy.

    Boxes may extend a little beyond the image, as hand-drawn boxes do, and a few may be invalid as xyxy too.
    """
    beyond = (boxes[:, :2] + boxes[:, 2:] > limits + 1).any(axis=1)
    corners = ((boxes[:, :2] <= boxes[:, 2:]) & (boxes[:, 2:] <= limits + 1)).all(axis=1)
    if beyond.sum() < 3 or beyond.mean() < 0.2 or corners.mean() < 0.99:
        return []
    return [
        f"{beyond.sum()} of {len(boxes)} annotations extend beyond their image with bbox as x, y, width, height; "
        "they look like x1, y1, x2, y2 and must be converted"
    ]


def _normalized_boxes(boxes: np.ndarray, limits: np.ndarray) -> list[str]:
    """One phrase if ``boxes`` (N, 4) in images of ``limits`` (N, 2) are fractions of the image's size.

    A box in pixels that is smaller than a pixel is useless, and so are files in which nearly all boxes are.
    """
    small = (boxes >= 0).all(axis=1) & (boxes <= 1).all(axis=1) & (limits > 2).all(axis=1)
    if not small.any() or small.mean() < 0.99 or not ((boxes[small, 2:] > 0) & (boxes[small, 2:] < 1)).any():
        return []
    return [
        f"the bbox of {counted(small.sum(), 'annotation', 'annotations')} of {len(boxes)} is within 0..1; they look "
        "normalized (as YOLO's x_center, y_center, width, height are) and must be converted to x, y, width, height in "
        "pixels"
    ]


def _rows_of(wanted: np.ndarray, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(N,) int64: for each of ``wanted`` (N,), the first of ``rows`` that has this id in ``ids`` (M,), or -1."""
    distinct, first = np.unique(ids[rows], return_index=True)
    if len(distinct) == 0:
        return np.full(len(wanted), -1)
    places = np.searchsorted(distinct, wanted).clip(max=len(distinct) - 1)
    return np.where(distinct[places] == wanted, rows[first[places]], -1)


class _Entries:
    """One list of a json, checked column by column.

    Attributes:
        good: (N,) bool, the entries without a fault so far.
        faults: the faults so far.
    """

    def __init__(
        self, plural: str, singular: str, entries: list[Any], name: Callable[[int], str] | None = None
    ) -> None:
        self._plural = plural
        self._singular = singular
        self._name_of = name or self._id_of
        self._is_object = np.array([isinstance(entry, dict) for entry in entries], dtype=bool)
        self._entries = [entry if isinstance(entry, dict) else {} for entry in entries]
        self.good = np.ones(len(entries), dtype=bool)
        self.faults: list[Problem] = []
        self.fault("not written as an object", ~self._is_object)

    def column(
        self, key: str, accepts: Callable[[Any], bool], problem: str, placeholder: Any, optional: bool = False
    ) -> tuple[list[Any], np.ndarray]:
        """The field ``key`` of all entries; missing fields are a fault unless ``optional``.

        Returns:
            The N values, with ``placeholder`` where they are missing or invalid; and (N,) bool, which of them are
            valid.
        """
        values = [entry.get(key, _ABSENT) for entry in self._entries]
        present = np.fromiter((value is not _ABSENT for value in values), bool, len(values))
        accepted = np.fromiter(map(accepts, values), bool, len(values))
        if not optional:
            self.fault(f"without {key}", self._is_object & ~present)
        self.fault(f"whose {problem}", present & ~accepted, key)
        if not accepted.all():
            values = [value if valid else placeholder for value, valid in zip(values, accepted)]
        return values, accepted

    def ids(self, optional: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Ids (N,) int64, and (N,) bool, which of them are integers. Repeated ids, except the first, are a fault.

        If they are ``optional``, either all entries have an id or none has.
        """
        if optional and not any("id" in entry for entry in self._entries):
            return np.zeros(len(self._entries), dtype=np.int64), np.zeros(len(self._entries), dtype=bool)
        values, accepted = self.column("id", _is_integer, "id is not an integer", 0)
        ids = np.array(values, dtype=np.int64)
        repeated = accepted.copy()
        rows = np.flatnonzero(accepted)
        repeated[rows[np.unique(ids[rows], return_index=True)[1]]] = False
        self.fault("listed twice", repeated)
        return ids, accepted

    def fault(self, kind: str, mask: np.ndarray, key: str | None = None) -> np.ndarray:
        """Record a fault of the entries under ``mask`` (N,) bool, shown with their field ``key``; returns the mask."""
        if mask.any():
            self.good &= ~mask
            count = counted(mask.sum(), self._singular, self._plural)
            self.faults.append(self.problem(f"{count} {kind}", mask, key))
        return mask

    def problem(self, text: str, mask: np.ndarray, key: str | None = None) -> Problem:
        """A problem of the entries under ``mask`` (N,) bool, shown with their field ``key``."""
        rows = np.flatnonzero(mask)
        return Problem(text, len(rows), tuple(self._name(row, key) for row in rows[:PLACES]))

    def _name(self, row: int, key: str | None) -> str:
        name = self._name_of(row)
        return name if key is None else f"{name}: {reprlib.repr(self._entries[row][key])}"

    def _id_of(self, row: int) -> str:
        entry = self._entries[row]
        return f"{self._singular} {entry['id']}" if _is_integer(entry.get("id")) else f"{self._plural}[{row}]"


_ABSENT = object()


def _is_integer(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LONGEST_SIDE


def _is_number(value: Any) -> bool:
    return (type(value) is float or type(value) is int) and -_LARGEST_NUMBER < value < _LARGEST_NUMBER


def _is_area(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_number, value))


def _is_flag(value: Any) -> bool:
    return type(value) in (int, bool) and value in (0, 1)


def _is_string(value: Any) -> bool:
    return type(value) is str


def _is_file_name(value: Any) -> bool:
    if type(value) is not str or not 0 < len(value) <= _LONGEST_NAME:
        return False
    # Control characters, halves of surrogate pairs, line and paragraph separators.
    return value.isprintable() or not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, value))


def _leaves_folder(file_name: str) -> bool:
    """Whether a file name points outside its folder on any system: absolute, on a drive, or through ``..``."""
    if not (".." in file_name or file_name[:1] in ("/", "\\") or file_name[1:2] == ":"):
        return False
    path = PureWindowsPath(file_name)
    if path.anchor:
        return True
    depths = accumulate(-1 if part == ".." else 1 for part in path.parts)
    return min(depths, default=0) < 0


def _relative_names(file_names: list[str], folder: Path) -> list[str]:
    """The file names, those that are absolute and inside ``folder`` relative to it."""
    if not any(map(os.path.isabs, file_names)):
        return file_names
    parents = [f"{parent}{os.sep}" for parent in {os.path.abspath(folder), os.path.realpath(folder)}]
    relative = []
    for name in file_names:
        path = os.path.normpath(name) if os.path.isabs(name) else ""
        inside = [path[len(parent) :] for parent in parents if path.startswith(parent)]
        relative.append(inside[0] if inside else name)
    return relative
