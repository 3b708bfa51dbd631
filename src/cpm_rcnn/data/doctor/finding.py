"""What the checks of a data set report."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["fault", "warning", "note"]
# The most severe first. A fault makes the training or its metrics wrong; a warning may be intended; a note is harmless.
SEVERITIES: tuple[Severity, ...] = ("fault", "warning", "note")
# Examples that a finding keeps.
EXAMPLES = 5
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Example:
    """A place that a finding is about.

    Attributes:
        split: the split.
        file: the image, or the annotation file.
        id: the image, annotation or category by its id, or the line; empty if the file has no ids.
        detail: what is special about it.
        size: (width, height) in pixels, if ``file`` is an image.
        boxes: x, y, width and height in pixels of the objects that it is about.
        whole: whether it is about the whole image, not about these objects only.
    """

    split: str
    file: str
    id: str = ""
    detail: str = ""
    size: tuple[int, int] | None = None
    boxes: tuple[Box, ...] = ()
    whole: bool = True

    def __str__(self) -> str:
        """For example ``train/a.jpg annotation 7 (3 x 4 pixels)``."""
        # The path of an annotation file says what it is; names of images may be the same in all splits.
        file = self.file if self.size is None else f"{self.split}/{self.file}"
        return " ".join(part for part in (file, self.id, self.detail and f"({self.detail})") if part)


@dataclass(frozen=True)
class Finding:
    """One kind of fault or peculiarity of a data set.

    Attributes:
        severity: ``fault``, ``warning`` or ``note``.
        kind: a short name of what was checked.
        sentence: what was found.
        count: how many images, objects, classes or entries it concerns.
        examples: the first few of them.
        advice: what to do.
        override: an option that solves it, as ``NAME=VALUE``; empty if there is none.
    """

    severity: Severity
    kind: str
    sentence: str
    count: int
    examples: tuple[Example, ...] = ()
    advice: str = ""
    override: str = ""


def by_importance(findings: Iterable[Finding]) -> list[Finding]:
    """The findings by severity, and otherwise in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def percent(count: int, total: int) -> str:
    """A share for a sentence, for example ``0.3 %``, ``12 %`` or ``under 0.1 %``."""
    share = 100 * count / max(total, 1)
    if 0 < share < 0.1:
        return "under 0.1 %"
    return f"{share:.1f} %" if share < 10 else f"{share:.0f} %"
