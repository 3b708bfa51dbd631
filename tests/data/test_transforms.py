import numpy as np
import pytest
import torch

from cpm_rcnn.data.transforms import EvalTransform, TrainTransform, flip, network_size, resize
from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS, INCLUSIVE


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
def test_shorter_side_meets_its_size_unless_the_longer_passes_the_limit(size, short_side, max_size, expected):
    assert network_size(size, short_side, max_size) == expected


def block_image(box, height=40, width=60):
    x1, y1, x2, y2 = box
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, y1:y2, x1:x2] = 255
    return image


def bounds(image):
    """Continuous box of the bright pixels."""
    ys, xs = torch.nonzero(image[0] > 127, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()[None]


@pytest.mark.parametrize("size", [(80, 120), (100, 90), (20, 30), (40, 60)])
def test_resize_moves_boxes_with_the_pixels(size):
    box = (12, 8, 36, 28)
    image, boxes = resize(block_image(box), torch.tensor([box], dtype=torch.float32), size)
    assert image.shape == (3, *size)
    assert image.dtype == torch.uint8
    assert boxes.dtype == torch.float32
    assert (boxes - bounds(image)).abs().max() <= 0.51


def test_resize_scales_boxes_by_the_ratios_after_rounding():
    _, boxes = resize(torch.zeros(3, 7, 11, dtype=torch.uint8), torch.tensor([[0.0, 0, 11, 7]]), (10, 16))
    assert torch.allclose(boxes, torch.tensor([[0.0, 0, 16, 10]]))


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda convention: convention.name)
def test_flip_moves_boxes_with_the_pixels_and_twice_is_nothing(convention):
    box = torch.tensor([[12.0, 8, 36, 28]])
    last = torch.tensor([0, 0, convention.extra, convention.extra])
    image, boxes = flip(block_image((12, 8, 36, 28)), box - last, convention)
    assert torch.equal(boxes + last, bounds(image))
    assert torch.equal(flip(image, boxes, convention)[1], box - last)


def test_no_boxes_stay_no_boxes():
    transform = TrainTransform((32,), 64, 1.0, 0)
    assert transform(torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(0, 4), 0)[1].shape == (0, 4)


def test_draw_depends_on_seed_and_number_alone():
    def transform(seed):
        return TrainTransform((600, 700, 800), 1333, 0.5, seed)

    forward = [transform(3).draw(number) for number in range(200)]
    backward = [transform(3).draw(number) for number in reversed(range(200))][::-1]
    assert forward == backward
    assert forward != [transform(4).draw(number) for number in range(200)]


def test_draws_are_the_same_on_every_machine():
    transform = TrainTransform((600, 700, 800), 1333, 0.5, 7)
    assert [transform.draw(number) for number in (0, 1, 10**9)] == [(800, True), (800, True), (800, False)]


def test_scales_and_flips_come_in_their_shares():
    draws = [TrainTransform((1, 2, 3, 4), 1333, 0.25, 0).draw(number) for number in range(4000)]
    counts = np.bincount([short_side for short_side, _ in draws])[1:]
    assert (abs(counts - 1000) < 120).all()
    assert abs(sum(mirror for _, mirror in draws) - 1000) < 120


@pytest.mark.parametrize(("probability", "flipped"), [(0.0, False), (1.0, True)])
def test_flip_probability_reaches_never_and_always(probability, flipped):
    transform = TrainTransform((40,), 60, probability, 0)
    assert {transform.draw(number)[1] for number in range(500)} == {flipped}
    image, boxes = transform(block_image((12, 8, 36, 28)), torch.tensor([[12.0, 8, 36, 28]]), 5)
    assert torch.equal(boxes, bounds(image))
    assert boxes[0, 0] == (24 if flipped else 12)


def test_train_transform_flips_in_its_own_convention():
    image, box = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.tensor([[0.0, 0, 9, 9]])
    assert TrainTransform((40,), 60, 1.0, 0, CONTINUOUS)(image, box, 0)[1].tolist() == [[51, 0, 60, 9]]
    assert TrainTransform((40,), 60, 1.0, 0, INCLUSIVE)(image, box, 0)[1].tolist() == [[50, 0, 59, 9]]


def test_eval_transform_resizes_and_never_flips():
    image, boxes = EvalTransform(20, 60)(block_image((12, 8, 36, 28)), torch.tensor([[12.0, 8, 36, 28]]), 3)
    assert image.shape == (3, 20, 30)
    assert boxes.tolist() == [[6, 4, 18, 14]]
