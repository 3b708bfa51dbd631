"""Reading all images of a split: which cannot be read, and what they look like."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from cpm_rcnn.data.doctor.checked_split import CheckedSplit
from cpm_rcnn.data.doctor.finding import EXAMPLES, Finding, Severity
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.near_duplicates import FINGERPRINT_BITS, fingerprint
from cpm_rcnn.data.problem import counted
from cpm_rcnn.data.threads import in_threads
from cpm_rcnn.errors import UserError

_Problem = Literal["unreadable", "size", "early"]


@dataclass(frozen=True)
class _Reading:
    """One image: the digest of its file, its packed fingerprint, and what is wrong with it."""

    digest: bytes = b""
    fingerprint: bytes = bytes(FINGERPRINT_BITS // 8)
    problem: _Problem | None = None
    message: str = ""


@dataclass(frozen=True, eq=False)
class ReadImages:
    """The I images of a split, after they were read.

    Attributes:
        split: the split.
        readable: (I,) bool, the images that can be used, also those that end early.
        digests: (I,) bytes, a hash of each readable file.
        fingerprints: (I, :data:`~cpm_rcnn.data.near_duplicates.FINGERPRINT_BITS`) bool, of the readable images.
        findings: what is wrong with the images.
    """

    split: CheckedSplit
    readable: np.ndarray
    digests: np.ndarray
    fingerprints: np.ndarray
    findings: list[Finding]

    @classmethod
    def of(cls, split: CheckedSplit, source: ImageSource, progress: bool) -> "ReadImages":
        """Read all images of a split, several at once.

        Args:
            split: the split.
            source: its images.
            progress: show a progress bar on standard error.
        """
        annotations = split.annotations
        names = annotations.file_names.tolist()
        sizes = list(zip(annotations.heights.tolist(), annotations.widths.tolist()))
        title = f"read the images of the {split.name} split"
        readings = in_threads(lambda row: _read(source, names[row], sizes[row]), range(len(names)), title, progress)
        packed = np.frombuffer(b"".join(reading.fingerprint for reading in readings), dtype=np.uint8)
        return cls(
            split,
            np.array([reading.digest != b"" for reading in readings], dtype=bool),
            np.array([reading.digest for reading in readings]),
            np.unpackbits(packed).astype(bool).reshape(-1, FINGERPRINT_BITS),
            _findings(split, source, readings),
        )


def _read(source: ImageSource, file_name: str, size: tuple[int, int]) -> _Reading:
    messages: list[str] = []
    try:
        raw = source.read_bytes(file_name)
        pixels = source.decode(file_name, raw, size, messages.append)
    except UserError as error:
        return _Reading(problem=_kind(source, file_name), message=_short(source, str(error)))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    digest = hashlib.blake2b(raw, digest_size=16).hexdigest().encode()
    bits = np.packbits(fingerprint(image)).tobytes()
    if messages:
        return _Reading(digest, bits, "early", _short(source, messages[0]))
    return _Reading(digest, bits)


def _kind(source: ImageSource, file_name: str) -> _Problem:
    """Whether a faulty image can be read, if any size is accepted."""
    try:
        source.read(file_name, warn=lambda message: None)
    except UserError:
        return "unreadable"
    return "size"


def _short(source: ImageSource, message: str) -> str:
    return message.removeprefix(f"{source.path}: ")


def _findings(split: CheckedSplit, source: ImageSource, readings: Sequence[_Reading]) -> list[Finding]:
    texts: dict[_Problem, tuple[Severity, str, str, str]] = {
        "unreadable": (
            "fault",
            "unreadable images",
            "cannot be read",
            "Replace them, or skip them with on_error=skip.",
        ),
        "size": ("fault", "image sizes", "{} another size than the annotations say", "Restore the annotated ones."),
        "early": ("warning", "truncated images", "{} early; the last pixels are lost", "Copy them again."),
    }
    verbs = {"unreadable": ("", ""), "size": ("has", "have"), "early": ("ends", "end")}
    found = []
    for problem, (severity, kind, text, advice) in texts.items():
        rows = [row for row, reading in enumerate(readings) if reading.problem == problem]
        if not rows:
            continue
        verb = verbs[problem][len(rows) > 1]
        images = counted(len(rows), "image", "images")
        sentence = f"{images} of the {split.name} split {text.format(verb)} ({source.path})."
        examples = tuple(split.image_example(row, _detail(split, row, readings[row])) for row in rows[:EXAMPLES])
        found.append(Finding(severity, kind, sentence, len(rows), examples, advice))
    return found


def _detail(split: CheckedSplit, row: int, reading: _Reading) -> str:
    """The message without the name of the image at its start."""
    return reading.message.removeprefix(f"{split.annotations.file_names[row]} ")
