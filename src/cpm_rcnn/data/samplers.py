"""The order of the samples of a run: which images are in which batch.

A run counts steps, not epochs. The samples of a step are a function of (seed, step) that can be evaluated at any step
directly, so a run that stops and resumes, or changes its number of workers, gets the same batches.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Philox
from torch import Tensor
from torch.utils.data import Sampler


class Sample(NamedTuple):
    """An image, and its position in the run.

    Attributes:
        image: row of the image in its annotations.
        number: number of earlier samples of the run, over all ranks; it seeds the augmentations of this sample.
    """

    image: int
    number: int


class Negatives(NamedTuple):
    """Images without objects that are mixed into the training images.

    Attributes:
        images: (K,) int64, their rows.
        portrait: (K,) bool, which ones are portrait images.
        share: share of the samples that they make, above 0 and below 1. It is rounded to a fraction whose denominator
            is at most 1000.
    """

    images: np.ndarray
    portrait: np.ndarray
    share: float


class TrainOrder:
    """An endless order of training batches, each with images of one orientation on all ranks.

    Portrait images and the others form two streams. A stream concatenates permutations of its images, so within it all
    images occur equally often. Each step takes its batch from one stream; the steps are distributed over the streams
    in proportion to their numbers of images, as evenly as whole batches allow. No image is dropped or buffered. With
    ``per_rank``, the same holds for the batches of the ranks, one after the other, instead of those of the steps.

    Negatives replace no image: they are inserted into the stream of their orientation at random positions, as many in
    each block of the denominator of their share as its numerator says. A stream without negatives of its orientation
    stays as it is. The order of the other images does not change.

    Args:
        images: rows of the images to train on.
        portrait: for each of them, whether it is a portrait image.
        seed: random seed of the run, at least 0.
        batch_size: images per step and rank.
        world_size: number of ranks.
        per_rank: whether the ranks of a step may get images of different orientations.
        negatives: images without objects; None for no such images.
    """

    def __init__(
        self,
        images: Sequence[int] | np.ndarray,
        portrait: np.ndarray,
        seed: int,
        batch_size: int,
        world_size: int,
        per_rank: bool = False,
        negatives: Negatives | None = None,
    ) -> None:
        rows = np.asarray(images, dtype=np.int64)
        portrait = np.asarray(portrait, dtype=bool)
        self.batch_size = batch_size
        self.world_size = world_size
        # Number of parts of a step that take their images from one stream each.
        self._parts = world_size if per_rank else 1
        streams = (_Stream(rows[~portrait], seed, 0), _Stream(rows[portrait], seed, 1))
        self._streams: Sequence[_Stream | _MixedStream] = streams
        if negatives is not None:
            self._streams = [
                _mixed(stream, negatives.images[negatives.portrait == group], negatives.share, seed, group)
                for group, stream in enumerate(streams)
            ]
        self._images = len(rows)
        self._portraits = int(portrait.sum())
        # The random start position in the alternation of the two streams; integer arithmetic is exact at any step.
        self._phase = int(Philox(key=[seed, 2], counter=_ORDER).random_raw()) % self._images

    def global_batch(self, step: int) -> list[Sample]:
        """The ``batch_size * world_size`` samples of one step, ordered by rank."""
        first = step * self._parts
        rows = [row for part in range(first, first + self._parts) for row in self._part(part)]
        return [Sample(row, step * len(rows) + position) for position, row in enumerate(rows)]

    def _part(self, part: int) -> list[int]:
        """The images of one part; parts are counted from the start of the run."""
        size = self.batch_size * self.world_size // self._parts
        before = self._portrait_parts(part)
        is_portrait = self._portrait_parts(part + 1) > before
        parts_of_stream = before if is_portrait else part - before
        return self._streams[is_portrait].take(parts_of_stream * size, size)

    def _portrait_parts(self, part: int) -> int:
        """How many of the first ``part`` parts use portrait images."""
        return (part * self._portraits + self._phase) // self._images


# Where the Philox counters of this module start. Those of transforms.sample_rng start at 0 and may have equal keys.
_ORDER = 1 << 192


class _Stream:
    """An endless sequence of seeded permutations of images, with random access."""

    def __init__(self, images: np.ndarray, seed: int, group: int) -> None:
        self._images = images
        self._key = [seed, group]
        self._epoch = -1
        self._shuffled = images

    def take(self, start: int, count: int) -> list[int]:
        """Items ``start`` to ``start + count`` of the stream."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, offset = divmod(start + len(taken), len(self._images))
            taken += self._permutation(epoch)[offset : offset + count - len(taken)].tolist()
        return taken

    def total(self, count: int) -> int:
        """The sum of the first ``count`` items."""
        epochs, offset = divmod(count, len(self._images))
        return epochs * int(self._images.sum()) + int(self._permutation(epochs)[:offset].sum())

    def _permutation(self, epoch: int) -> np.ndarray:
        # Sorts raw output, not Generator.permutation: numpy promises only the former to be the same in all versions.
        if epoch != self._epoch:
            words = Philox(key=self._key, counter=_ORDER + (epoch << 64)).random_raw(len(self._images))
            self._epoch, self._shuffled = epoch, self._images[np.argsort(words, kind="stable")]
        return self._shuffled


class _MixedStream:
    """A stream into which the items of another one are inserted.

    Args:
        stream: the stream.
        other: the other stream.
        flags: an endless sequence of permutations of zeros and ones, which says at which positions the other's items
            are.
    """

    def __init__(self, stream: _Stream, other: _Stream, flags: _Stream) -> None:
        self._both = (stream, other)
        self._flags = flags

    def take(self, start: int, count: int) -> list[int]:
        """Items ``start`` to ``start + count`` of the stream."""
        inserted = self._flags.total(start)
        taken: list[int] = []
        for position, flag in enumerate(self._flags.take(start, count), start=start):
            taken += self._both[flag].take(inserted if flag else position - inserted, 1)
            inserted += flag
        return taken


def _mixed(stream: _Stream, negatives: np.ndarray, share: float, seed: int, group: int) -> _Stream | _MixedStream:
    if not len(negatives):
        return stream
    exact = min(max(Fraction(share).limit_denominator(1000), Fraction(1, 1000)), Fraction(999, 1000))
    flags = np.arange(exact.denominator) < exact.numerator
    # 0 to 2 are the keys of the streams and of their alternation.
    return _MixedStream(stream, _Stream(negatives, seed, 3 + group), _Stream(flags.astype(np.int64), seed, 5 + group))


class TrainBatchSampler(Sampler[list[Sample]]):
    """The batches of one rank, for the steps ``start`` to ``stop`` of a run.

    Its length is ``stop``, not ``stop - start``: when a run resumes, Lightning counts batches from the start of the
    run and ends when the count reaches the length of the loader.

    Args:
        order: order of the run.
        rank: rank of this process, which determines its part of each global batch.
        start: first step.
        stop: one past the last step.
    """

    def __init__(self, order: TrainOrder, rank: int, start: int, stop: int) -> None:
        self.order = order
        self.rank = rank
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[list[Sample]]:
        size = self.order.batch_size
        for step in range(self.start, self.stop):
            yield self.order.global_batch(step)[self.rank * size : (self.rank + 1) * size]

    def __len__(self) -> int:
        return self.stop


class EvalSampler(Sampler[int]):
    """Every ``world_size``-th row, starting at ``rank``.

    All ranks yield the same number of rows, as collective operations need. If the images run out in the last round,
    it repeats the first ones; code that collects the results must drop these duplicates by image id.

    Args:
        count: number of images.
        rank: rank of this process.
        world_size: number of ranks.
    """

    def __init__(self, count: int, rank: int = 0, world_size: int = 1) -> None:
        self.count = count
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[int]:
        for turn in range(len(self)):
            yield (turn * self.world_size + self.rank) % self.count

    def __len__(self) -> int:
        return -(-self.count // self.world_size)


def collate(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """A list of images and a list of targets. Images are padded later by the detector, on its device."""
    images, targets = zip(*samples)
    return list(images), list(targets)
