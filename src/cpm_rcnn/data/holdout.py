"""A validation split from the training images of a data set that has none.

Images that look alike, such as frames of a video or copies, are on the same side, because the metrics would otherwise
show how well the model remembers. The choice depends on the seed and on the images and their names, not on their order.
"""

import hashlib
import logging
from collections.abc import Sequence

import numpy as np

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.near_duplicates import SIMILAR_BITS, fingerprints, group_similar
from cpm_rcnn.data.problem import counted
from cpm_rcnn.data.settings import OnError
from cpm_rcnn.errors import ArgumentError, UserError

_log = logging.getLogger(__name__)

# In how many bits similar fingerprints may differ; stricter limits are for groups that are too large to be held out.
_LIMITS = (SIMILAR_BITS, SIMILAR_BITS // 2, SIMILAR_BITS // 4, SIMILAR_BITS // 8, 0)


def hold_out(
    annotations: CocoAnnotations,
    images: ImageSource,
    fraction: float,
    seed: int,
    on_error: OnError = "raise",
    progress: bool = False,
) -> np.ndarray:
    """Choose the validation images.

    If so many images look alike that they cannot be held out together, as those of a fixed camera do, they are grouped
    with stricter limits, and a warning is logged.

    Args:
        annotations: the annotations of all images.
        images: reads them.
        fraction: part of the images to hold out, above 0 and below 1.
        seed: random seed of the choice.
        on_error: what to do with an image that cannot be read: ``raise``, or ``skip`` to take it as unlike all others.
        progress: show a progress bar on standard error.

    Returns:
        (I,) bool, the images to hold out.

    Raises:
        ArgumentError: there is only one image, or all images are the same.
        UserError: an image cannot be read, and ``on_error`` is ``raise``.
    """
    names = annotations.file_names.tolist()
    wanted = min(max(1, round(fraction * len(names))), len(names) - 1)
    bits, problems = fingerprints(images, names, progress)
    if problems and on_error == "raise":
        first = problems[min(problems)]
        raise UserError(f"{first}; correct it, or take it as unlike all others with on_error=skip")
    groups = np.arange(len(names))
    readable = np.setdiff1d(groups, list(problems))
    groups[readable], divided = _groups_up_to(bits[readable], wanted)
    groups[readable] = readable[groups[readable]]
    held_out = np.zeros(len(names), dtype=bool)
    count = 0
    for members in _shuffled(groups, names, seed):
        if count + len(members) <= wanted:
            held_out[members] = True
            count += len(members)
    if not count:
        reason = "all images are the same" if len(names) > 1 else "there is only one image"
        raise ArgumentError("val_fraction", f"={fraction}: nothing can be held out of {annotations.path}; {reason}")
    if divided:
        _log.warning(
            "%s: %d of %s look alike, so that some may be in both splits and the validation metrics too good",
            annotations.path,
            divided,
            counted(len(names), "image", "images"),
        )
    return held_out


def _groups_up_to(bits: np.ndarray, largest: int) -> tuple[np.ndarray, int]:
    """Group similar images, and divide groups of more than ``largest`` images with stricter limits.

    Returns:
        (N,) int64, one row of each row's group; and how many images were in groups that were divided.
    """
    groups = np.zeros(len(bits), dtype=np.int64)
    divided = 0
    for limit in _LIMITS:
        too_large = np.flatnonzero(np.bincount(groups, minlength=1) > largest)
        if limit < SIMILAR_BITS:
            divided = max(divided, int(np.isin(groups, too_large).sum()))
        for group in too_large:
            rows = np.flatnonzero(groups == group)
            groups[rows] = rows[group_similar(bits[rows], limit)]
    return groups, divided


def _shuffled(groups: np.ndarray, names: Sequence[str], seed: int) -> list[np.ndarray]:
    """The rows of each group, in a random order that depends on the seed and on the first name of each group only."""
    rows = np.argsort(groups, kind="stable")
    members = np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1)

    def draw(group: np.ndarray) -> bytes:
        first = min(names[row] for row in group.tolist())
        return hashlib.sha256(f"{seed} {first}".encode("utf-8", "surrogatepass")).digest()

    return sorted(members, key=draw)
