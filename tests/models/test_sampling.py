import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_rcnn.models.sampling import rank_in_group, sample_balanced


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(0, 60), groups=st.integers(1, 6))
def test_rank_is_the_position_within_the_group(seed, count, groups):
    random = np.random.default_rng(seed)
    key, group = random.integers(0, 5, count).astype(np.float32), random.integers(0, groups, count)
    expected = [sum(group[j] == group[i] and (key[j], j) < (key[i], i) for j in range(count)) for i in range(count)]
    rank, sizes = rank_in_group(torch.from_numpy(key), torch.from_numpy(group), groups)
    assert rank.dtype == sizes.dtype == torch.int64
    assert rank.tolist() == expected
    assert sizes.tolist() == np.bincount(group, minlength=groups).tolist()


def draw(positives, negatives, neither=0, count=8, positive_fraction=0.25, order=None):
    """A sample of a batch; image i has positives[i], negatives[i] and ``neither`` rows, in ``order`` or shuffled."""
    images = len(positives)
    kind = torch.cat([torch.tensor([1] * p + [0] * n + [-1] * neither) for p, n in zip(positives, negatives)])
    image = torch.arange(images).repeat_interleave(torch.tensor(positives) + torch.tensor(negatives) + neither)
    shuffle = torch.randperm(len(kind)) if order is None else order
    kind, image = kind[shuffle], image[shuffle]
    sample = sample_balanced(kind == 1, kind == 0, image, images, count=count, positive_fraction=positive_fraction)
    return kind, image, sample


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4),
    count=st.integers(1, 16),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_positives_are_limited_per_image_and_negatives_fill_the_rest(sizes, count, fraction):
    positives, negatives = zip(*sizes)
    kind, image, sample = draw(positives, negatives, neither=3, count=count, positive_fraction=fraction)
    for i, (has_positive, has_negative) in enumerate(sizes):
        expected = min(has_positive, int(count * fraction))
        assert sample.positive[image == i].sum() == expected
        assert sample.negative[image == i].sum() == min(has_negative, count - expected)
    assert (kind[sample.positive] == 1).all()
    assert (kind[sample.negative] == 0).all()


def test_chosen_positives_of_each_image_are_ranked_from_zero():
    _, image, sample = draw([9, 1, 0], [5, 5, 5])
    for i, chosen in enumerate((2, 1, 0)):
        assert sorted(sample.rank[sample.positive & (image == i)].tolist()) == list(range(chosen))


def test_all_rows_are_chosen_and_ranked_first_with_equal_probability():
    torch.manual_seed(0)
    order = torch.arange(20)
    chosen, first = torch.zeros(20), torch.zeros(20)
    draws = 1500
    for _ in range(draws):
        _, _, sample = draw([10], [10], count=8, positive_fraction=0.5, order=order)
        chosen += sample.positive | sample.negative
        first += sample.positive & (sample.rank < 1)
    # Each is chosen with probability 0.4; five standard deviations.
    assert (chosen / draws - 0.4).abs().max() < 5 * (0.24 / draws) ** 0.5
    assert (first[:10] / draws - 0.1).abs().max() < 5 * (0.09 / draws) ** 0.5


def test_images_are_sampled_independently():
    torch.manual_seed(0)
    order = torch.arange(8)
    same = 0
    for _ in range(400):
        _, _, sample = draw([4, 4], [0, 0], count=1, positive_fraction=1.0, order=order)
        same += torch.equal(sample.positive[:4], sample.positive[4:])
    assert abs(same / 400 - 0.25) < 5 * (0.1875 / 400) ** 0.5


def test_same_seed_gives_the_same_sample():
    def again():
        torch.manual_seed(5)
        return draw([10], [10], order=torch.arange(20))[2]

    assert all(torch.equal(a, b) for a, b in zip(again(), again()))


def test_sample_of_no_rows_is_empty():
    none = torch.zeros(0, dtype=torch.bool)
    sample = sample_balanced(none, none, torch.zeros(0, dtype=torch.int64), 2, count=8, positive_fraction=0.25)
    assert [len(part) for part in sample] == [0, 0, 0]


@pytest.mark.parametrize(("count", "fraction", "most"), [(512, 0.25, 128), (256, 0.5, 128), (3, 0.5, 1)])
def test_maximum_number_of_positives_is_rounded_down(count, fraction, most):
    _, _, sample = draw([200], [600], count=count, positive_fraction=fraction)
    assert (sample.positive.sum(), sample.negative.sum()) == (most, count - most)
