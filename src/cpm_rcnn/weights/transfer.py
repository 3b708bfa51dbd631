"""Transfer of weights between two detectors that share some parts.

A part is the backbone, the feature pyramid, the RPN, or a part of a head that has a role
(:class:`~cpm_rcnn.models.heads.base.Role`). It is taken as a whole if its parameters have the same names and shapes,
except that classification layers are taken row by row, by the names of the classes.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.build import build
from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.models.heads import RoIHead
from cpm_rcnn.models.heads.base import Role
from cpm_rcnn.weights.starting import StartingDetector

# Deformable convolutions start as ordinary ones, because their offsets are initialized with zeros.
_OFFSETS = ".conv_offset."
_LISTED = 6


class Transfer(NamedTuple):
    """What happened to one part of a model.

    Attributes:
        part: the beginning of its parameter names.
        taken: whether its weights come from the file.
        details: which part of the file, or why it was initialized.
    """

    part: str
    taken: bool
    details: str


def transfer(
    detector: TwoStageDetector, class_names: Sequence[str], start: StartingDetector, *, repeat_stages: bool = False
) -> list[Transfer]:
    """Load the weights of ``start`` that fit into ``detector``; the others keep their values.

    Args:
        detector: the detector.
        class_names: names of its classes 1..C.
        start: the detector that the weights come from.
        repeat_stages: whether stages that ``start`` does not have are taken from its last stage of the same kind.

    Returns:
        What happened to each part.

    Raises:
        UserError: the backbones do not have the same input format, or no weight of the backbone fits.
    """
    ours, theirs = (settings.backbone for settings in (detector.settings, start.settings))
    with torch.device("meta"):
        other = build(start.settings, start.num_classes)
    classes = _Classes(list(class_names), start.class_names, start.num_classes)
    own = detector.state_dict()
    by_class = {f"head.{name}" for name in detector.head.class_parameters()}
    loaded: dict[str, Tensor] = {}
    rows: list[Transfer] = []
    for part, name in _pairs(detector.head, other.head, repeat_stages).items():
        if name is None:
            rows.append(Transfer(part, False, "initialized: the file has no such part"))
            continue
        found = _part(own, start.state, part, name, by_class, classes)
        if found is None:
            rows.append(Transfer(part, False, f"initialized: {name} of the file has other names or shapes"))
            continue
        loaded |= found
        details = "from the file" if part == name else f"from {name} of the file"
        layers = by_class & own.keys() & {each for each in own if each.startswith(f"{part}.")}
        rows.append(Transfer(part, True, f"{details}; {classes.description}" if layers else details))
    if not any(row.taken for row in rows if row.part == "backbone.body"):
        raise UserError(f"{start.source}: its backbone, {theirs.name}, does not fit this model's, {ours.name}")
    if ours.resolved_format != theirs.resolved_format:
        raise UserError(
            f"{start.source}: its backbone needs input_format={theirs.resolved_format.to_dict()}, but this model has "
            f"{ours.resolved_format.to_dict()}; backbone.input_format=null uses the file's"
        )
    detector.load_state_dict(own | loaded)
    return rows


def _pairs(head: RoIHead, other: RoIHead, repeat_stages: bool) -> dict[str, str | None]:
    """The part of the file for each part of the model, by the beginnings of their parameter names."""
    theirs = {role: prefix for prefix, role in other.roles().items()}
    pairs: dict[str, str | None] = {name: name for name in ("backbone.body", "backbone.fpn", "rpn")}
    for prefix, role in head.roles().items():
        name = theirs.get(role)
        if name is None and repeat_stages:
            name = _last_of(theirs, role)
        pairs[f"head.{prefix}"] = None if name is None else f"head.{name}"
    return pairs


def _last_of(theirs: Mapping[Role, str], role: Role) -> str | None:
    """The part with the kind of ``role`` that belongs to the last stage."""
    same = [each for each in theirs if each.kind == role.kind]
    return theirs[max(same, key=lambda each: each.stage)] if same else None


def _part(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    part: str,
    name: str,
    by_class: Collection[str],
    classes: "_Classes",
) -> dict[str, Tensor] | None:
    """The tensors of one part by this model's names; None if names or shapes differ."""
    ours = {each.removeprefix(part): value for each, value in own.items() if each.startswith(f"{part}.")}
    theirs = {each.removeprefix(name): value for each, value in state.items() if each.startswith(f"{name}.")}
    ours = {each: value for each, value in ours.items() if each in theirs or _OFFSETS not in each}
    if ours.keys() != theirs.keys():
        return None
    found = {}
    for each, value in ours.items():
        if part + each in by_class:
            taken = classes.take(value, theirs[each])
        else:
            taken = theirs[each] if theirs[each].shape == value.shape else None
        if taken is None:
            return None
        found[part + each] = taken
    return found


class _Classes:
    """The classes that a model and a file share; names are compared without regard to case and outer spaces.

    Args:
        ours: names of the model's classes.
        theirs: names of the file's classes; empty if unknown.
        their_number: number of the file's classes.
    """

    def __init__(self, ours: Sequence[str], theirs: Sequence[str], their_number: int) -> None:
        self.ours, self.number, self.their_number = list(ours), len(ours), their_number
        self.same = list(ours) == list(theirs)
        index = {name.strip().lower(): k for k, name in enumerate(theirs)}
        names = [name.strip().lower() for name in ours]
        self.pairs = [(k, index[name]) for k, name in enumerate(names) if name in index]

    def take(self, value: Tensor, theirs: Tensor) -> Tensor | None:
        """A layer's weight or bias with the file's rows of shared classes, and of the background if it has one.

        None if the layers are of different kinds. Without a shared class, ``value``.
        """
        if self.same and value.shape == theirs.shape:
            return theirs
        layout, their_layout = self._layout(len(value), self.number), self._layout(len(theirs), self.their_number)
        if layout is None or layout != their_layout or value.shape[1:] != theirs.shape[1:]:
            return None
        if not self.pairs:
            return value
        background, per_class = layout
        taken = value.clone()
        taken[:background] = theirs[:background]
        for k, other in self.pairs:
            first, their_first = background + k * per_class, background + other * per_class
            taken[first : first + per_class] = theirs[their_first : their_first + per_class]
        return taken

    @property
    def description(self) -> str:
        """Which classes the file has."""
        if self.same:
            return "all classes"
        if not self.pairs:
            return "classification layers initialized: no class of that name in the file"
        missing = [self.ours[k] for k in sorted(set(range(self.number)) - {k for k, _ in self.pairs})]
        if not missing:
            return "all classes, by name"
        listed = ", ".join(missing[:_LISTED]) + (", .." if len(missing) > _LISTED else "")
        return f"{len(self.pairs)} of {self.number} classes by name, initialized: {listed}"

    @staticmethod
    def _layout(rows: int, classes: int) -> tuple[int, int] | None:
        """Rows of the background and rows per class: a classifier's, a box regressor's, or None."""
        if rows == classes + 1:
            return 1, 1
        return (0, 4) if rows == 4 * classes else None
