"""Random subsets of RoIs or anchors with a limited share of positives, for a whole batch at once."""

from typing import NamedTuple

import torch
from torch import Tensor


class BalancedSample(NamedTuple):
    """A random subset of a batch's RoIs or anchors.

    Attributes:
        positive: (N,) bool, True for the sampled positives.
        negative: (N,) bool, True for the sampled negatives.
        rank: (N,) int64, a random order 0, 1, ... of the positives of each image, so that ``rank < k`` selects k
            of them at random. Undefined for other rows.
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
    """Sample up to ``count`` rows of each image at random, at most ``count * positive_fraction`` of them positive.

    Negatives fill the places that positives leave free. No operation synchronizes with the device.

    Args:
        positive: (N,) bool, the rows that are positive.
        negative: (N,) bool, disjoint from ``positive``; rows that are neither are never sampled.
        images: (N,) int64 in 0..num_images - 1, the image of each row.
        num_images: number of images in the batch.
        count: maximum number of rows per image.
        positive_fraction: maximum share of positives in ``count``, 0..1.
    """
    group = torch.where(positive, images, torch.where(negative, images + num_images, 2 * num_images))
    key = torch.rand(len(images), device=images.device)
    rank, sizes = rank_in_group(key, group, 2 * num_images + 1)
    most_positives = int(count * positive_fraction)
    chosen_positive = positive & (rank < most_positives)
    max_negatives = count - sizes[:num_images].clamp(max=most_positives)
    chosen_negative = negative & (rank < max_negatives[images])
    return BalancedSample(chosen_positive, chosen_negative, rank)


def rank_in_group(key: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The rank of each row within its group, by ascending ``key``; equal keys keep their order.

    Args:
        key: (N,) floating point.
        group: (N,) int64 in 0..num_groups - 1.
        num_groups: number of groups.

    Returns:
        The ranks (N,) int64 and the group sizes (num_groups,) int64.
    """
    order = key.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = torch.zeros(num_groups, dtype=torch.int64, device=group.device)
    sizes.scatter_add_(0, group, torch.ones_like(group))
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device) - starts[group[order]]
    return rank, sizes
