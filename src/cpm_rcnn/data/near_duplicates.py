"""Images that look alike: copies of other sizes and formats, frames of a video, slightly moved or edited pictures."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from cpm_rcnn.data.images import ImageSource, eight_bits
from cpm_rcnn.data.threads import in_threads
from cpm_rcnn.errors import UserError

# An image is reduced to this many pixels per side; its fingerprint has a bit for each difference to the pixel on the
# right and to the one below.
_SIDE = 12
FINGERPRINT_BITS = 2 * _SIDE**2
# Images whose fingerprints differ in at most this many bits look alike. docs/data.md has the measurements behind it.
SIMILAR_BITS = 52
# Pairs that are compared at once, which bounds the memory.
_PAIRS = 1 << 22


def fingerprint(image: Image.Image, transpose: Image.Transpose | None = None) -> np.ndarray:
    """The difference hash (dHash) of an image in gray, (:data:`FINGERPRINT_BITS`,) bool.

    Args:
        image: the image, 8 bits per channel.
        transpose: the transformation that makes it upright; None if it is upright.
    """
    small = image.convert("L").resize((_SIDE + 1, _SIDE + 1), Image.Resampling.BOX)
    gray = np.asarray(small if transpose is None else small.transpose(transpose))
    right = gray[:-1, 1:] > gray[:-1, :-1]
    below = gray[1:, :-1] > gray[:-1, :-1]
    return np.concatenate([right.ravel(), below.ravel()])


def fingerprints(
    images: ImageSource, file_names: Sequence[str], progress: bool = False
) -> tuple[np.ndarray, dict[int, str]]:
    """:func:`fingerprint` of many images.

    Args:
        images: where the images are.
        file_names: their names.
        progress: show a progress bar on standard error.

    Returns:
        (N, :data:`FINGERPRINT_BITS`) bool; and from the row of each image that cannot be read, whose bits are False,
        to a message that says why.
    """

    def read(file_name: str) -> np.ndarray | str:
        try:
            with images.opened(file_name) as (image, transpose):
                # JPEGs are decoded at a fraction of their size.
                image.draft("L", (8 * _SIDE, 8 * _SIDE))
                return fingerprint(eight_bits(image), transpose)
        except UserError as error:
            return str(error)

    found = in_threads(read, file_names, f"compare images of {images.path.name}", progress)
    problems = {row: value for row, value in enumerate(found) if isinstance(value, str)}
    nothing = np.zeros(FINGERPRINT_BITS, dtype=bool)
    bits = np.array([nothing if isinstance(value, str) else value for value in found], dtype=bool)
    return bits.reshape(-1, FINGERPRINT_BITS), problems


def group_similar(bits: np.ndarray, limit: int = SIMILAR_BITS) -> np.ndarray:
    """Group fingerprints: two are in one group if a chain of similar ones connects them.

    Args:
        bits: (N, B) bool.
        limit: number of bits in which similar fingerprints may differ.

    Returns:
        (N,) int64, the smallest row of each row's group.
    """
    distinct, inverse = np.unique(bits, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    # With bits as +1 and -1, the product is the number of equal bits minus that of different ones.
    signs = np.where(distinct, np.float32(1), np.float32(-1))
    least = bits.shape[1] - 2 * limit
    chunk = max(1, _PAIRS // max(1, len(signs)))
    groups = np.arange(len(signs))
    for start in range(0, len(signs), chunk):
        one, other = np.nonzero(signs[start : start + chunk] @ signs.T >= least)
        groups = _components(len(signs), groups[one + start], groups[other])[groups]
    _, first, members = np.unique(groups[inverse], return_index=True, return_inverse=True)
    return first[members.reshape(-1)]


def _components(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(count,) int64, the smallest node of each node's connected component, in a graph of edges one -> other (P,)."""
    smallest = np.arange(count)
    while True:
        lower = smallest.copy()
        np.minimum.at(lower, one, smallest[other])
        np.minimum.at(lower, other, smallest[one])
        # The smallest node of the smallest node halves the length of chains.
        lower = lower[lower]
        if np.array_equal(lower, smallest):
            return smallest
        smallest = lower
