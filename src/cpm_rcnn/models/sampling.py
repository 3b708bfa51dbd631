"""Which RoIs train: random subsets with a share of positives, for a whole batch at once (spec sections 3, 4, 7)."""

from typing import NamedTuple

import torch
from torch import Tensor


class BalancedSample(NamedTuple):
    """A random subset of a batch's RoIs or anchors.

    Attributes:
        positive: (N,) bool, chosen as positive.
        negative: (N,) bool, chosen as negative.
        rank: (N,) int64, the random place 0, 1, ... of each chosen positive among its image's; a further cut of the
            positives to k keeps ``rank < k``. Undefined elsewhere.
    """

    positive: Tensor
    negative: Tensor
    rank: Tensor


def sample_balanced(
    positive: Tensor,
    negative: Tensor,
    images: Tensor,
    num_images: int,
    *,
    count: int,
    positive_fraction: float,
) -> BalancedSample:
    """Choose at random, for each image, up to ``count`` of which at most ``positive_fraction`` are positive.

    Negatives fill what the positives leave. No host sync.

    Args:
        positive: (N,) bool.
        negative: (N,) bool, disjoint from ``positive``; what is neither is never chosen.
        images: (N,) int64 in 0..num_images - 1.
        num_images: images in the batch.
        count: how many to choose for an image at most.
        positive_fraction: 0..1.
    """
    group = torch.where(positive, images, torch.where(negative, images + num_images, 2 * num_images))
    key = torch.rand(len(images), device=images.device)
    rank, sizes = rank_in_group(key, group, 2 * num_images + 1)
    most_positives = int(count * positive_fraction)
    chosen_positive = positive & (rank < most_positives)
    room = count - sizes[:num_images].clamp(max=most_positives)
    chosen_negative = negative & (rank < room[images])
    return BalancedSample(chosen_positive, chosen_negative, rank)


def rank_in_group(key: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The place of each element among its group, by ascending ``key``; ties in their order.

    Args:
        key: (N,) floating.
        group: (N,) int64 in 0..num_groups - 1.
        num_groups: how many groups there may be.

    Returns:
        The ranks (N,) int64 and the groups' sizes (num_groups,) int64.
    """
    order = key.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = torch.zeros(num_groups, dtype=torch.int64, device=group.device)
    sizes.scatter_add_(0, group, torch.ones_like(group))
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[group[order]]
    return rank, sizes
