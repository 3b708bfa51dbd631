"""Losses as (sum, count), so that a mean is over the RoIs of all processes and not the mean of their means."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LossTerm:
    """A loss before its division.

    Attributes:
        total: () float32, the weighted sum over RoIs (or cells, or anchors).
        count: how many were summed: an int, or a () tensor where only the device knows.
    """

    total: Tensor
    count: int | Tensor

    def weighted(self, weight: float) -> "LossTerm":
        """The same term with its loss weight applied."""
        return LossTerm(self.total * weight, self.count)


def resolve(terms: dict[str, LossTerm]) -> dict[str, Tensor]:
    """Means by name: total / count, 0 where nothing was counted.

    Under ``torch.distributed`` each count is the mean of the processes' counts (one all-reduce for all terms). DDP
    averages gradients over processes, so that their sum is divided by the whole count, as on one process that had
    all images; a process without RoIs adds zero and changes nobody's share.
    """
    device = next(iter(terms.values())).total.device
    counts = torch.stack(
        [
            term.count.float() if isinstance(term.count, Tensor) else torch.full((), float(term.count), device=device)
            for term in terms.values()
        ]
    )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
        counts /= dist.get_world_size()
    # Below one RoI on average, a count over several processes is a fraction: only zero itself needs a guard.
    counts = torch.where(counts > 0, counts, 1.0)
    return {name: term.total / count for (name, term), count in zip(terms.items(), counts.unbind())}
