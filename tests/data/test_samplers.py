from collections import Counter

import numpy as np
import pytest
import torch

from cpm_rcnn.data.samplers import EvalSampler, TrainBatchSampler, TrainOrder, collate


def order(n_landscape=37, n_portrait=11, seed=5, batch_size=4, world_size=2, per_rank=False):
    """An order in which portrait images have rows from 100, so that rows differ from positions."""
    rows = np.concatenate([np.arange(n_landscape), 100 + np.arange(n_portrait)])
    return TrainOrder(rows, rows >= 100, seed, batch_size, world_size, per_rank)


def test_a_step_is_the_same_in_whatever_order_steps_are_asked_for():
    forward = [order().global_batch(step) for step in range(60)]
    shared = order()
    for step in np.random.default_rng(0).permutation(60):
        assert shared.global_batch(int(step)) == forward[step] == order().global_batch(int(step))


def test_a_far_step_is_available_at_once():
    assert len(order().global_batch(10**12)) == 8


def test_another_seed_gives_another_order():
    assert [order(seed=1).global_batch(s) for s in range(5)] != [order(seed=2).global_batch(s) for s in range(5)]


def test_order_is_the_same_on_every_machine():
    assert [sample.image for sample in order().global_batch(3)] == [18, 17, 36, 29, 4, 34, 25, 10]


def test_samples_are_numbered_consecutively_through_the_run():
    for it in (order(), order(per_rank=True)):
        assert [sample.number for step in range(7) for sample in it.global_batch(step)] == list(range(7 * 8))


def test_global_batch_has_one_orientation():
    for step in range(200):
        assert len({sample.image >= 100 for sample in order().global_batch(step)}) == 1


def test_with_per_rank_each_rank_s_batch_has_one_orientation_and_steps_mix_them():
    it, mixed = order(per_rank=True), 0
    for step in range(200):
        portrait = [sample.image >= 100 for sample in it.global_batch(step)]
        assert len(set(portrait[:4])) == len(set(portrait[4:])) == 1
        mixed += portrait[0] != portrait[4]
    assert mixed > 50


@pytest.mark.parametrize("per_rank", [False, True])
@pytest.mark.parametrize(("n_landscape", "n_portrait"), [(37, 11), (3, 2), (1, 1), (0, 5), (5, 0), (40, 1)])
def test_all_images_of_a_stream_occur_equally_often(n_landscape, n_portrait, per_rank):
    it = order(n_landscape, n_portrait, per_rank=per_rank)
    counts = Counter(sample.image for step in range(480) for sample in it.global_batch(step))
    for group in (range(n_landscape), range(100, 100 + n_portrait)):
        seen = [counts[row] for row in group]
        assert not seen or max(seen) - min(seen) <= 1


@pytest.mark.parametrize(("n_landscape", "n_portrait"), [(37, 11), (3, 2), (40, 1)])
def test_streams_are_used_in_proportion_to_their_images(n_landscape, n_portrait):
    it, total = order(n_landscape, n_portrait), n_landscape + n_portrait
    portrait = np.cumsum([it.global_batch(step)[0].image >= 100 for step in range(500)])
    assert (abs(portrait - np.arange(1, 501) * n_portrait / total) <= 1).all()


def test_each_epoch_of_a_stream_is_a_different_permutation():
    it = order(24, 0, batch_size=8, world_size=1)
    epochs = [[s.image for step in range(3 * e, 3 * e + 3) for s in it.global_batch(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_ranks_partition_the_global_batch():
    it = order(batch_size=3, world_size=4)
    parts = [list(TrainBatchSampler(it, rank, 10, 20)) for rank in range(4)]
    for index, step in enumerate(range(10, 20)):
        assert [sample for part in parts for sample in part[index]] == it.global_batch(step)


def test_same_global_batch_on_any_number_of_ranks():
    one, four = order(batch_size=8, world_size=1), order(batch_size=2, world_size=4)
    assert all(one.global_batch(step) == four.global_batch(step) for step in range(50))


def test_resumed_sampler_continues_where_the_run_stopped_and_keeps_its_length():
    whole = list(TrainBatchSampler(order(), 1, 0, 30))
    resumed = TrainBatchSampler(order(), 1, 12, 30)
    assert list(resumed) == whole[12:]
    assert len(resumed) == 30


@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (10, 4), (3, 5), (0, 2)])
def test_eval_ranks_have_equal_counts_and_cover_every_image(count, world_size):
    samplers = [EvalSampler(count, rank, world_size) for rank in range(world_size)]
    drawn = [list(sampler) for sampler in samplers]
    assert {len(part) for part in drawn} == {len(sampler) for sampler in samplers}
    rows = [row for part in drawn for row in part]
    assert set(rows) == set(range(count))
    assert len(rows) < count + world_size


def test_collate_keeps_images_of_different_sizes_in_a_list():
    samples = [(torch.zeros(3, 4, 5), {"image_id": 1}), (torch.zeros(3, 6, 2), {"image_id": 2})]
    images, targets = collate(samples)
    assert [image.shape for image in images] == [(3, 4, 5), (3, 6, 2)]
    assert targets == [{"image_id": 1}, {"image_id": 2}]
