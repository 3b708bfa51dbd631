"""The order of a run: which images stand in which batch.

A run counts steps, not epochs. Which samples a step gets is a function of (seed, step) that can be asked for at any
step without walking there, so a run may stop, resume and change its number of workers and still see the same batches.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Philox
from torch import Tensor
from torch.utils.data import Sampler


class Sample(NamedTuple):
    """An image, and the place in the run where it is shown.

    Attributes:
        image: row of the image in its annotations.
        number: count of the samples shown before it in the run, over all ranks; seeds its augmentation.
    """

    image: int
    number: int


class TrainOrder:
    """An endless order of training batches, each of one orientation over all ranks.

    Portraits and the rest form two streams. A stream is one permutation of its images after another, so within it
    every image comes equally often. The steps are dealt to the streams in proportion to their numbers of images, as
    evenly as whole batches allow; nothing is dropped and nothing waits in a buffer.

    Args:
        images: rows of the images to train on.
        portrait: for each of them, whether it is higher than wide.
        seed: of the run, at least 0.
        batch_size: images per step and rank.
        world_size: number of ranks.
    """

    def __init__(
        self,
        images: Sequence[int] | np.ndarray,
        portrait: np.ndarray,
        seed: int,
        batch_size: int,
        world_size: int,
    ) -> None:
        rows = np.asarray(images, dtype=np.int64)
        portrait = np.asarray(portrait, dtype=bool)
        self.batch_size = batch_size
        self.world_size = world_size
        self._streams = (_Stream(rows[~portrait], seed, 0), _Stream(rows[portrait], seed, 1))
        self._images = len(rows)
        self._portraits = int(portrait.sum())
        # Where in the cycle of the two streams the run starts; an integer keeps the deal exact at any step.
        self._phase = int(Philox(key=[seed, 2], counter=_ORDER).random_raw()) % self._images

    def global_batch(self, step: int) -> list[Sample]:
        """The samples of one step over all ranks; ``batch_size * world_size`` of them, rank after rank."""
        size = self.batch_size * self.world_size
        before = self._portrait_steps(step)
        is_portrait = self._portrait_steps(step + 1) > before
        steps_of_stream = before if is_portrait else step - before
        rows = self._streams[is_portrait].take(steps_of_stream * size, size)
        return [Sample(row, step * size + place) for place, row in enumerate(rows)]

    def _portrait_steps(self, step: int) -> int:
        """How many of the first ``step`` steps draw portraits."""
        return (step * self._portraits + self._phase) // self._images


# The start of the counters of this module's draws. Those of transforms.py, under keys that may be equal, start at 0.
_ORDER = 1 << 192


class _Stream:
    """Images in an endless sequence of seeded permutations, with random access."""

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

    def _permutation(self, epoch: int) -> np.ndarray:
        # Sorting raw words, not Generator.permutation: numpy promises only the former to stay the same over versions.
        if epoch != self._epoch:
            words = Philox(key=self._key, counter=_ORDER + (epoch << 64)).random_raw(len(self._images))
            self._epoch, self._shuffled = epoch, self._images[np.argsort(words, kind="stable")]
        return self._shuffled


class TrainBatchSampler(Sampler[list[Sample]]):
    """One rank's part of the steps ``start`` to ``stop`` of a run.

    Its length is ``stop``, not ``stop - start``: Lightning counts the batches of a resumed run from the run's first,
    adds those already done, and ends when it reaches the loader's length.

    Args:
        order: the run's order.
        rank: which part of each global batch to yield.
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


class EvalSampler(Sampler[Sample]):
    """Every ``world_size``-th image, from ``rank`` on.

    All ranks yield the same number of samples, as collective operations need: the last round starts over with the
    first images where they run out, and whoever collects results must drop such duplicates by image id.

    Args:
        count: number of images.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, count: int, rank: int = 0, world_size: int = 1) -> None:
        self.count = count
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[Sample]:
        for turn in range(len(self)):
            row = (turn * self.world_size + self.rank) % self.count
            yield Sample(row, row)

    def __len__(self) -> int:
        return -(-self.count // self.world_size)


def collate(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Lists of images and of targets; the detector pads on the device, where it is cheap."""
    images, targets = zip(*samples)
    return list(images), list(targets)
