"""Which classes of a data set are detected, in which order and under which names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpm_rcnn.errors import ArgumentError, check_list, shown


@dataclass(frozen=True)
class ClassSelection:
    """The classes to detect, and the names that they have in the annotation files.

    Attributes:
        names: the classes; label k + 1 stands for item k.
        new_names: from a name in the annotation files to the class that it belongs to. Names that are not in it are
            left out.
    """

    names: tuple[str, ...]
    new_names: Mapping[str, str]

    @classmethod
    def from_setting(cls, setting: Sequence[Any]) -> "ClassSelection":
        """The selection that a list of names and of ``{new: old}`` or ``{new: [old, ...]}`` describes.

        A renamed class also keeps the objects that already have its new name, unless another class takes that name.

        Raises:
            ArgumentError: the list is invalid (:func:`check_classes`).
        """
        check_classes("classes", setting)
        entries = [_names(entry) for entry in setting]
        new_names = {new: new for new, _ in entries} | {old: new for new, olds in entries for old in olds}
        return cls(tuple(new for new, _ in entries), new_names)

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The classes in COCO's format, ``{"id": .., "name": ..}``, with the ids 1..C."""
        return [{"id": number, "name": name} for number, name in enumerate(self.names, start=1)]

    def absent(self, names: Iterable[str]) -> list[str]:
        """The classes that none of ``names`` belongs to."""
        present = {self.new_names.get(name) for name in names}
        return [name for name in self.names if name not in present]


def check_classes(argument: str, value: Any) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a list that :meth:`ClassSelection.from_setting` accepts."""
    check_list(argument, value)
    if not len(value):
        raise ArgumentError(argument, "=[]: must not be empty")
    allowed = "must be a name, or {new: old} or {new: [old, ...]} to rename and merge"
    taken: dict[str, str] = {}
    for k, entry in enumerate(value):
        valid = isinstance(entry, str) or (isinstance(entry, Mapping) and len(entry) == 1)
        new, olds = _names(entry) if valid else ("", ())
        if not valid or not olds or not all(isinstance(name, str) and name for name in (new, *olds)):
            quoted = "; write numbers in quotes" if not isinstance(entry, (str, Mapping)) else ""
            raise ArgumentError(f"{argument}[{k}]", f"={shown(entry)}: {allowed}{quoted}")
        for old in olds:
            if old in taken:
                raise ArgumentError(f"{argument}[{k}]", f"={shown(entry)}: {old} belongs to {taken[old]} already")
            taken[old] = new
    names = [_names(entry)[0] for entry in value]
    if repeated := [name for k, name in enumerate(names) if name in names[:k]]:
        raise ArgumentError(argument, f"={shown(value)}: {repeated[0]} occurs twice")


def match_categories(
    ids: np.ndarray,
    names: Sequence[str],
    known: Sequence[Mapping[str, Any]],
    classes: ClassSelection | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the categories of a file among those that a model knows.

    Two categories match if they have the same id and name, or else the same name, if the model knows it only once.

    Args:
        ids: (C,) int64, the ids in the file.
        names: the names in the file.
        known: the categories of the model, each with ``id`` and ``name``.
        classes: translates the names of the file before they are matched.

    Returns:
        (C,) int64, the ids that the model has for them; and (C,) bool, which ones it knows.
    """
    by_name: dict[str, list[int]] = {}
    for category in known:
        by_name.setdefault(category["name"], []).append(int(category["id"]))
    matched, found = ids.copy(), np.zeros(len(ids), dtype=bool)
    for row, name in enumerate(names):
        candidates = by_name.get(name if classes is None else classes.new_names.get(name, ""), [])
        if int(ids[row]) in candidates:
            found[row] = True
        elif len(candidates) == 1:
            matched[row], found[row] = candidates[0], True
    return matched, found


def _names(entry: str | Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    """The name of a class, and the names that it has in the annotation files."""
    if isinstance(entry, str):
        return entry, (entry,)
    ((new, old),) = entry.items()
    return new, (old,) if isinstance(old, str) else tuple(old) if isinstance(old, Sequence) else ()
