"""Losses as a sum and a count, so that means are taken over the RoIs of all processes."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LossTerm:
    """A loss before the division by its count.

    Attributes:
        total: () float32, the weighted sum over valid RoIs (or cells, or anchors).
        count: the number of summed items: an int, or a () tensor if the number is only known on the device.
    """

    total: Tensor
    count: int | Tensor

    def weighted(self, weight: float) -> "LossTerm":
        """The same term times a loss weight."""
        return LossTerm(self.total * weight, self.count)


def reduce_losses(terms: dict[str, LossTerm], mean_over: str = "run") -> dict[str, Tensor]:
    """The mean of each term by name: total / count, or 0 if the count is 0.

    Under ``torch.distributed`` each count is replaced by its mean over the processes, with one all-reduce for all
    terms. DDP averages gradients over the processes, so the result is the gradient of the mean over all RoIs, as if one
    process had all images. A process without RoIs contributes zero and does not change the others' weights.

    Args:
        terms: the losses.
        mean_over: ``run``, as above, or ``process``: every process divides by its own counts.
    """
    device = next(iter(terms.values())).total.device
    counts = torch.stack(
        [
            term.count.float() if isinstance(term.count, Tensor) else torch.full((), float(term.count), device=device)
            for term in terms.values()
        ]
    )
    if mean_over == "run" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
        counts /= dist.get_world_size()
    # A mean count over several processes can be a fraction below 1, so only zero is replaced.
    counts = torch.where(counts > 0, counts, 1.0)
    return {name: term.total / count for (name, term), count in zip(terms.items(), counts.unbind())}
