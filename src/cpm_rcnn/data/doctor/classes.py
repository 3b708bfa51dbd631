"""The balance of the classes, and classes that a split lacks."""

import re
from collections.abc import Sequence

import numpy as np

from cpm_rcnn.data.doctor.checked_split import CheckedSplit
from cpm_rcnn.data.doctor.finding import EXAMPLES, Finding, Severity
from cpm_rcnn.data.problem import counted

# Fewer training objects than this are too few to learn from.
_FEW = 10
# The most frequent class has this many times as many objects as the rarest one.
_IMBALANCE = 100


def class_counts(split: CheckedSplit) -> np.ndarray:
    """(C,) int64, the number of used objects of each class."""
    return np.bincount(split.labels, minlength=len(split.annotations.category_ids) + 1)[1:]


def class_findings(splits: Sequence[CheckedSplit]) -> list[Finding]:
    """Classes without objects in all or some splits, rare classes and the imbalance of the classes."""
    splits = [split for split in splits if split.annotations.has_annotations]
    if not splits:
        return []
    counts: dict[str, np.ndarray] = {split.name: class_counts(split) for split in splits}
    total = np.sum(list(counts.values()), axis=0)
    found = []
    root = _root_class(splits[0], total)
    if root:
        found.append(root)
        total[0] = 1  # it is not a class without objects
    if (empty := total == 0).any():
        sentence = f"{_have(empty)} no objects in any split."
        advice = "Leave them out with classes=[...], or annotate objects of them."
        found.append(_finding("warning", "class without objects", splits[0], empty, sentence, advice))
    present = (total > 0) & ~((np.arange(len(total)) == 0) & (root is not None))
    if "train" in counts:
        train = next(split for split in splits if split.name == "train")
        untrained = present & (counts["train"] == 0)
        if untrained.any():
            sentence = f"{_have(untrained)} objects, but none in the train split, from which a model learns."
            found.append(_finding("fault", "class missing in train", train, untrained, sentence, "", counts))
        rare = present & (counts["train"] > 0) & (counts["train"] < _FEW)
        if rare.any():
            sentence = f"{_have(rare)} fewer than {_FEW} training objects."
            found.append(_finding("warning", "rare class", train, rare, sentence, "", counts))
        found += _imbalance(train, counts["train"])
    for split in splits:
        missing = present & (counts[split.name] == 0)
        if split.name != "train" and missing.any():
            sentence = f"{_have(missing)} no objects in the {split.name} split, so that AP is undefined there."
            found.append(_finding("warning", f"class missing in {split.name}", split, missing, sentence, "", counts))
    return found


def _root_class(split: CheckedSplit, total: np.ndarray) -> Finding | None:
    """The class that Roboflow adds: a superclass of all others, with id 0, that no object has."""
    annotations = split.annotations
    if len(total) < 2 or annotations.category_ids[0] != 0 or total[0] or not total[1:].any():
        return None
    name, others = annotations.category_names[0], annotations.category_names[1:]
    return Finding(
        "warning",
        "root class",
        f"Category 0 ({name}) has no objects: it looks like the common superclass that Roboflow adds. The model would "
        "learn a class that does not exist.",
        1,
        (split.category_example(1),),
        "Remove it from the json, or select the other classes.",
        # Other names would need quotes of Hydra and of the shell.
        f"classes=[{','.join(others)}]" if all(re.fullmatch(r"[A-Za-z][\w-]*", each) for each in others) else "",
    )


def _imbalance(split: CheckedSplit, counts: np.ndarray) -> list[Finding]:
    known = np.where(counts > 0, counts, counts.max(initial=0))
    if not counts.any() or counts.max() < _IMBALANCE * known.min():
        return []
    most, least = int(counts.argmax()) + 1, int(known.argmin()) + 1
    names = split.annotations.category_names
    sentence = (
        f"{names[most - 1]} has {counts.max() / known.min():.0f} times as many training objects as {names[least - 1]}."
    )
    examples = tuple(split.category_example(label, _objects(int(counts[label - 1]))) for label in (most, least))
    return [Finding("note", "class balance", sentence, 2, examples)]


def _have(which: np.ndarray) -> str:
    return f"{counted(which.sum(), 'class has', 'classes have')}"


def _objects(count: int) -> str:
    return counted(count, "object", "objects")


def _finding(
    severity: Severity,
    kind: str,
    split: CheckedSplit,
    which: np.ndarray,
    sentence: str,
    advice: str,
    counts: dict[str, np.ndarray] | None = None,
) -> Finding:
    """A finding about the classes under ``which`` (C,) bool, with the numbers of their objects per split."""
    examples = []
    for row in np.flatnonzero(which)[:EXAMPLES].tolist():
        numbers = ", ".join(f"{name} {each[row]}" for name, each in (counts or {}).items())
        examples.append(split.category_example(row + 1, numbers))
    return Finding(severity, kind, sentence, int(which.sum()), tuple(examples), advice)
