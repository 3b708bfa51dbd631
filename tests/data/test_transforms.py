import numpy as np
import pytest
import torch
from numpy.random import Philox

from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS, INCLUSIVE
from cpm_rcnn.data.transforms import (
    RandomFlip,
    RandomResize,
    Resize,
    flip,
    network_size,
    resize,
    sample_rng,
    select_objects,
)


@pytest.mark.parametrize(
    ("size", "short_side", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((480, 1280), 800, 1333, (500, 1333)),
        ((1000, 1000), 400, 1333, (400, 400)),
        ((1, 5000), 800, 1333, (1, 1333)),
    ],
)
def test_shorter_side_has_its_length_unless_the_longer_exceeds_the_maximum(size, short_side, max_size, expected):
    assert network_size(size, short_side, max_size) == expected


@pytest.mark.parametrize(
    ("size", "short_side", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),
        ((640, 480), 800, 1333, (1066, 800)),
        ((480, 1285), 800, 1333, (497, 1333)),
        ((1000, 1000), 400, 1333, (400, 400)),
        ((1, 5000), 800, 1333, (1, 1333)),
        # 334 * (800 / 334) is 799.99... in floating point.
        ((334, 500), 800, 1333, (800, 1197)),
    ],
)
def test_rounding_down_drops_the_fraction_of_a_pixel_and_keeps_exact_lengths(size, short_side, max_size, expected):
    assert network_size(size, short_side, max_size, "down") == expected


def test_random_resize_rounds_as_it_is_told():
    image, rng = torch.zeros(3, 48, 64, dtype=torch.uint8), sample_rng(0, 0)
    shapes = [RandomResize((80,), 134, rounding)(image, target_of(), rng)[0].shape for rounding in ("nearest", "down")]
    assert shapes == [(3, 80, 107), (3, 80, 106)]


def block_image(box, height=40, width=60):
    x1, y1, x2, y2 = box
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, y1:y2, x1:x2] = 255
    return image


def bounds(image):
    """Continuous box of the bright pixels."""
    ys, xs = torch.nonzero(image[0] > 127, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()[None]


def target_of(*boxes):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.arange(len(boxes)) + 1}


@pytest.mark.parametrize("size", [(80, 120), (100, 90), (20, 30), (40, 60)])
def test_resize_moves_boxes_with_the_pixels(size):
    box = (12, 8, 36, 28)
    image, boxes = resize(block_image(box), torch.tensor([box], dtype=torch.float32), size)
    assert image.shape == (3, *size)
    assert image.dtype == torch.uint8
    assert boxes.dtype == torch.float32
    assert (boxes - bounds(image)).abs().max() <= 0.51


def test_resize_scales_boxes_by_the_ratio_of_the_rounded_sizes():
    _, boxes = resize(torch.zeros(3, 7, 11, dtype=torch.uint8), torch.tensor([[0.0, 0, 11, 7]]), (10, 16))
    assert torch.allclose(boxes, torch.tensor([[0.0, 0, 16, 10]]))


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda convention: convention.name)
def test_flip_moves_boxes_with_the_pixels_and_two_flips_cancel(convention):
    box = torch.tensor([[12.0, 8, 36, 28]])
    last = torch.tensor([0, 0, convention.extra, convention.extra])
    image, boxes = flip(block_image((12, 8, 36, 28)), box - last, convention)
    assert torch.equal(boxes + last, bounds(image))
    assert torch.equal(flip(image, boxes, convention)[1], box - last)


every_augmentation = pytest.mark.parametrize(
    "augmentation",
    [RandomResize((20,), 64), RandomFlip(1.0, CONTINUOUS), Resize(20, 64)],
    ids=lambda augmentation: type(augmentation).__name__,
)


@every_augmentation
def test_augmentations_accept_images_without_objects(augmentation):
    _, target = augmentation(torch.zeros(3, 40, 60, dtype=torch.uint8), target_of(), sample_rng(0, 0))
    assert target["boxes"].shape == (0, 4)


@every_augmentation
def test_augmentations_keep_all_entries_in_step_and_do_not_modify_their_arguments(augmentation):
    image, target = (
        block_image((12, 8, 36, 28)),
        target_of([12, 8, 36, 28], [0, 0, 9, 9]) | {"area": torch.tensor([7, 8])},
    )
    image_before, boxes_before = image.clone(), target["boxes"].clone()
    _, changed = augmentation(image, target, sample_rng(0, 0))
    assert not torch.equal(changed["boxes"], target["boxes"])
    assert changed["labels"].tolist() == [1, 2]
    assert changed["area"].tolist() == [7, 8]
    assert torch.equal(image, image_before)
    assert torch.equal(target["boxes"], boxes_before)


def test_objects_are_selected_from_all_entries():
    target = target_of([0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]) | {"area": torch.tensor([1, 4, 9])}
    selected = select_objects(target, torch.tensor([True, False, True]))
    assert selected["boxes"][:, 2].tolist() == [1, 3]
    assert selected["labels"].tolist() == [1, 3]
    assert selected["area"].tolist() == [1, 9]


SIDES = (600, 700, 800)


def draw(seed, number, sides=SIDES, probability=0.5):
    """The shorter side and the flip of a sample, as the training list draws them from one generator."""
    rng = sample_rng(seed, number)
    return RandomResize(sides, 1333).draw(rng), RandomFlip(probability, CONTINUOUS).draw(rng)


def test_draws_depend_only_on_seed_and_sample_number():
    forward = [draw(3, number) for number in range(200)]
    backward = [draw(3, number) for number in reversed(range(200))][::-1]
    assert forward == backward
    assert forward != [draw(4, number) for number in range(200)]


def test_draws_are_the_same_on_every_machine():
    assert [draw(7, number) for number in (0, 1, 10**9)] == [(800, True), (800, True), (800, False)]


def test_resize_uses_the_first_word_of_the_sample_and_flip_the_second():
    for seed, number in [(0, 0), (7, 1), (2**32 - 1, 10**12), *((5, number) for number in range(200))]:
        scale, mirror = (int(word) / 2**64 for word in Philox(key=[seed, number]).random_raw(2))
        assert draw(seed, number, probability=0.3) == (SIDES[int(scale * len(SIDES))], mirror < 0.3)


def test_scales_and_flips_have_their_probabilities():
    draws = [draw(0, number, (1, 2, 3, 4), 0.25) for number in range(4000)]
    counts = np.bincount([short_side for short_side, _ in draws])[1:]
    assert (abs(counts - 1000) < 120).all()
    assert abs(sum(flipped for _, flipped in draws) - 1000) < 120


@pytest.mark.parametrize(("probability", "flipped"), [(0.0, False), (1.0, True)])
def test_flip_probability_0_is_never_and_1_is_always(probability, flipped):
    augmentation = RandomFlip(probability, CONTINUOUS)
    assert {augmentation.draw(sample_rng(0, number)) for number in range(500)} == {flipped}
    image, target = augmentation(block_image((12, 8, 36, 28)), target_of([12, 8, 36, 28]), sample_rng(0, 5))
    assert torch.equal(target["boxes"], bounds(image))
    assert target["boxes"][0, 0] == (24 if flipped else 12)


def test_flip_uses_the_convention_of_the_boxes():
    image, target = torch.zeros(3, 40, 60, dtype=torch.uint8), target_of([0, 0, 9, 9])
    for convention, expected in ((CONTINUOUS, [51, 0, 60, 9]), (INCLUSIVE, [50, 0, 59, 9])):
        assert RandomFlip(1.0, convention)(image, target, sample_rng(0, 0))[1]["boxes"].tolist() == [expected]


def test_evaluation_resizes_without_drawing():
    rng = sample_rng(0, 0)
    image, target = Resize(20, 60)(block_image((12, 8, 36, 28)), target_of([12, 8, 36, 28]), rng)
    assert image.shape == (3, 20, 30)
    assert target["boxes"].tolist() == [[6, 4, 18, 14]]
    assert rng.bit_generator.random_raw() == sample_rng(0, 0).bit_generator.random_raw()


def test_evaluation_without_a_shorter_side_keeps_the_image():
    image, target = block_image((12, 8, 36, 28)), target_of([12, 8, 36, 28])
    resized, kept = Resize(None, 20)(image, target, sample_rng(0, 0))
    assert torch.equal(resized, image)
    assert torch.equal(kept["boxes"], target["boxes"])
