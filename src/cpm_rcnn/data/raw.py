"""Annotations as they were read from files of any format, before they are checked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cpm_rcnn.data.problem import Problem, counted
from cpm_rcnn.data.validation import read_json
from cpm_rcnn.remote.urls import Location


class ProblemCollector:
    """Collects the problems that are found while files are read, by kind."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str, str], list[str]] = {}

    def add(self, singular: str, plural: str, what: str, place: str) -> None:
        """Record a problem, for example a ``label`` (one of ``labels``) ``of an unknown class`` at ``a.txt line 7``."""
        self._places.setdefault((singular, plural, what), []).append(place)

    def problems(self) -> list[Problem]:
        """One problem per kind, with its count and first places."""
        return [
            Problem.at(f"{counted(len(places), singular, plural)} {what}", places)
            for (singular, plural, what), places in self._places.items()
        ]


@dataclass(frozen=True, eq=False)
class RawAnnotations:
    """The annotations of one split in the structure of a COCO json, unchecked.

    Attributes:
        path: the json, or the file or folder that states which images the split has.
        content: as :func:`~cpm_rcnn.data.validation.read_json` returns it.
        image_name: what messages call an image, by its position: the file and line that it was read from. None calls it
            by its id.
        object_name: the same for an annotation. Such annotations have a ``line`` in ``content``.
        faults: errors in the files, which skipping an image or an annotation corrects; what they are about is not in
            ``content``.
        notes: what is valid but unusual.
    """

    path: Location
    content: dict[str, Any]
    image_name: Callable[[int], str] | None = None
    object_name: Callable[[int], str] | None = None
    faults: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)

    @classmethod
    def from_json(cls, path: Location) -> "RawAnnotations":
        """The content of a COCO-style json.

        Raises:
            UserError: the file cannot be read or has another structure.
            UnavailableError: the server of a remote file refuses or does not answer.
        """
        return cls(path, read_json(path))
