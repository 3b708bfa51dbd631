"""Images that occur several times, within a split or in several of them."""

from collections.abc import Sequence

import numpy as np

from cpm_rcnn.data.doctor.finding import EXAMPLES, Finding, Severity
from cpm_rcnn.data.doctor.images import ReadImages
from cpm_rcnn.data.near_duplicates import group_similar
from cpm_rcnn.data.problem import counted


def duplicate_findings(splits: Sequence[ReadImages]) -> list[Finding]:
    """Equal files and similar images. An image of which there is a copy earlier in the order of the splits counts."""
    if not splits:
        return []
    rows = [np.flatnonzero(each.readable) for each in splits]
    split_of = np.repeat(np.arange(len(splits)), [len(each) for each in rows])
    row_of = np.concatenate(rows)
    digests = np.concatenate([each.digests[kept] for each, kept in zip(splits, rows)])
    bits = np.concatenate([each.fingerprints[kept] for each, kept in zip(splits, rows)])
    equal = np.unique(digests, return_inverse=True)[1].reshape(-1)
    similar = group_similar(bits)

    copies = {}
    for kind, groups in (("equal", equal), ("similar", similar)):
        everywhere = _first_of(groups)
        within = _first_of(groups * len(splits) + split_of)
        # The images are in the order of the splits, so the first one of a group is in its first split.
        copies[kind, "between"] = everywhere, split_of[everywhere] < split_of
        copies[kind, "within"] = within, within != np.arange(len(within))
    for where in ("between", "within"):
        first, is_copy = copies["similar", where]
        copies["similar", where] = first, is_copy & ~copies["equal", where][1]

    consequence = "Such images make the metrics too good."
    texts: tuple[tuple[str, str, Severity, str, str, str], ...] = (
        ("equal", "between", "fault", "{} also in another split", "Keep each image in one split.", "same file as"),
        ("equal", "within", "warning", "{} contained twice", "Keep one of them, if their boxes agree.", "same file as"),
        (
            "similar",
            "between",
            "warning",
            "{} like one of another split",
            "Keep similar images together.",
            "looks like",
        ),
        ("similar", "within", "note", "{} like another one of the split", "", "looks like"),
    )
    found = []
    for kind, where, severity, text, advice, relation in texts:
        first, is_copy = copies[kind, where]
        for number, each in enumerate(splits):
            copied = np.flatnonzero(is_copy & (split_of == number))
            if not len(copied):
                continue
            verbs = ("is", "are") if kind == "equal" else ("looks", "look")
            examples = []
            for place in copied[:EXAMPLES].tolist():
                original = int(first[place])
                name = splits[split_of[original]].split.image_name(int(row_of[original]))
                examples.append(each.split.image_example(int(row_of[place]), f"{relation} {name}"))
            sentence = (
                f"{counted(len(copied), 'image', 'images')} of the {each.split.name} split "
                f"{text.format(verbs[len(copied) > 1])}."
            )
            reason = f"{consequence} {advice}" if where == "between" else advice
            found.append(Finding(severity, f"{kind} images", sentence, len(copied), tuple(examples), reason))
    return found


def _first_of(groups: np.ndarray) -> np.ndarray:
    """(N,) int64, the first row that has the group of each row of ``groups`` (N,) int64."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]
