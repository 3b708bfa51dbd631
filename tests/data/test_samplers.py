from collections import Counter

import numpy as np
import pytest
import torch

from cpm_rcnn.data.samplers import EvalSampler, Negatives, TrainBatchSampler, TrainOrder, collate


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


# --- negatives, whose rows start at 1000, those of portrait images at 1500 ---


def with_negatives(share, n_landscape=7, n_portrait=3, **options):
    rows = np.concatenate([np.arange(37), 100 + np.arange(11)])
    empty = np.concatenate([1000 + np.arange(n_landscape), 1500 + np.arange(n_portrait)])
    options = {"seed": 5, "batch_size": 4, "world_size": 2, **options}
    return TrainOrder(rows, rows >= 100, negatives=Negatives(empty, empty >= 1500, share), **options)


def is_portrait(sample):
    return 100 <= sample.image < 1000 or sample.image >= 1500


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 1 / 3, 0.5, 0.95])
def test_negatives_make_their_share_of_each_stream(share):
    it = with_negatives(share)
    samples = [sample for step in range(1000) for sample in it.global_batch(step)]
    for portrait in (False, True):
        stream = [sample.image >= 1000 for sample in samples if is_portrait(sample) == portrait]
        assert abs(np.mean(stream) - share) <= 1 / len(stream) + 1e-3
    assert all(len({is_portrait(sample) for sample in it.global_batch(step)}) == 1 for step in range(300))


def test_negatives_do_not_change_the_order_of_the_other_images():
    it, plain = with_negatives(0.25), order()

    def streams(it, steps):
        samples = [sample for step in range(steps) for sample in it.global_batch(step)]
        others = [sample for sample in samples if sample.image < 1000]
        return [[s.image for s in others if is_portrait(s) == portrait] for portrait in (False, True)]

    for mixed, alone in zip(streams(it, 400), streams(plain, 400)):
        assert mixed == alone[: len(mixed)]


def test_negatives_occur_equally_often_and_at_random_positions():
    it = with_negatives(0.25, n_landscape=7, n_portrait=0)
    steps = [it.global_batch(step) for step in range(700)]
    counts = Counter(sample.image for batch in steps for sample in batch if sample.image >= 1000)
    assert len(counts) == 7
    assert max(counts.values()) - min(counts.values()) <= 1
    positions = Counter(position for batch in steps for position, sample in enumerate(batch) if sample.image >= 1000)
    assert len(positions) == 8
    assert min(positions.values()) > 0.5 * max(positions.values())


def test_a_stream_without_negatives_of_its_orientation_stays_as_it_is():
    it = with_negatives(0.5, n_portrait=0)
    portrait = [s.image for step in range(300) for s in it.global_batch(step) if is_portrait(s)]
    alone = [s.image for step in range(300) for s in order().global_batch(step) if is_portrait(s)]
    assert portrait == alone


@pytest.mark.parametrize("per_rank", [False, True])
def test_a_step_with_negatives_depends_on_nothing_but_seed_and_step(per_rank):
    forward = [with_negatives(0.3, per_rank=per_rank).global_batch(step) for step in range(60)]
    shared = with_negatives(0.3, per_rank=per_rank)
    for step in np.random.default_rng(0).permutation(60):
        assert shared.global_batch(int(step)) == forward[step]
    assert [sample.number for batch in forward for sample in batch] == list(range(60 * 8))
    assert len(shared.global_batch(10**12)) == 8
    if not per_rank:
        one = with_negatives(0.3, batch_size=8, world_size=1)
        assert all(one.global_batch(step) == forward[step] for step in range(60))


def test_order_with_negatives_is_the_same_on_every_machine():
    assert [sample.image for sample in with_negatives(0.25).global_batch(3)] == [8, 1004, 1, 15, 20, 7, 1002, 12]


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
