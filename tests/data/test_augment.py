"""Augmentations that cut, turn, recolor and mix images, and the presets of them."""

import pytest
import torch

from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS, INCLUSIVE
from cpm_rcnn.data.crops import LargeScaleJitter, QuarterTurns, RandomCrop, crop
from cpm_rcnn.data.mixing import CopyPaste, Mosaic
from cpm_rcnn.data.photometric import PhotometricDistortion
from cpm_rcnn.data.presets import training_augmentations
from cpm_rcnn.data.settings import AUGMENT, DataSettings
from cpm_rcnn.data.transforms import RandomFlip, RandomResize, network_size, sample_rng

HEIGHT, WIDTH = 60, 90
BOXES = ((12, 8, 36, 28), (50, 30, 80, 55), (4, 40, 20, 52))
both_conventions = pytest.mark.parametrize("convention", [CONTINUOUS, INCLUSIVE], ids=lambda each: each.name)


def blocks(*boxes, convention=CONTINUOUS, size=(HEIGHT, WIDTH), brightness=40):
    """An image with a block of its own brightness for each box, and its target; labels count the blocks."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = brightness * (k + 1)
    xywh = torch.tensor([[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes], dtype=torch.float32).reshape(-1, 4)
    return image, {"boxes": convention.from_xywh(xywh), "labels": torch.arange(len(boxes)) + 1}


def assert_boxes_surround_their_blocks(image, target, convention, brightness=40, tolerance=0.0):
    assert len(target["boxes"]) == len(target["labels"]) > 0
    for box, label in zip(convention.to_xywh(target["boxes"]), target["labels"].tolist()):
        ys, xs = torch.nonzero((image[0].int() - brightness * label).abs() <= 3, as_tuple=True)
        low, high = torch.stack([xs.min(), ys.min()]), torch.stack([xs.max(), ys.max()]) + 1
        found = torch.cat([low, high - low]).float()
        assert (box - found).abs().max() <= tolerance, (label, box, found)


@both_conventions
def test_a_crop_moves_and_clips_boxes_with_the_pixels_and_drops_objects_that_are_hardly_visible(convention):
    image, target = blocks(*BOXES, convention=convention)
    # Of the third block, 2 of 16 columns remain.
    window, objects = crop(image, target, (10, 18), (50, 72), convention)
    assert window.shape == (3, 50, 72)
    assert objects["labels"].tolist() == [1, 2]
    assert_boxes_surround_their_blocks(window, objects, convention)


@both_conventions
def test_random_crops_contain_a_whole_object_and_turns_move_boxes_with_the_pixels(convention):
    image, target = blocks(*BOXES, convention=convention)
    sizes, turned = set(), set()
    for number in range(60):
        rng = sample_rng(0, number)
        window, objects = RandomCrop(1.0, 0.2, convention)(image, target, rng)
        assert_boxes_surround_their_blocks(window, objects, convention)
        whole = convention.area(target["boxes"])[objects["labels"] - 1]
        assert (convention.area(objects["boxes"]) == whole).any()
        sizes.add(tuple(window.shape))
        result = QuarterTurns(convention)(image, target, rng)
        assert_boxes_surround_their_blocks(*result, convention)
        turned.add((tuple(result[0].shape), tuple(result[1]["boxes"][0].tolist())))
    assert len(sizes) > 30
    assert len(turned) == 4


def test_a_quarter_turn_is_counterclockwise():
    image, target = blocks((60, 0, 90, 10))
    results = (QuarterTurns(CONTINUOUS)(image, target, sample_rng(0, number)) for number in range(30))
    found = {tuple(turned["boxes"][0].tolist()) for _, turned in results}
    # Top right, bottom right after a turn by 270 degrees, bottom left, top left after one by 90 degrees.
    assert found == {(60, 0, 90, 10), (50, 60, 60, 90), (0, 50, 30, 60), (0, 0, 10, 30)}


def test_large_scale_jitter_scales_within_its_range_and_cuts_at_the_size_of_the_network():
    # One block, because the smooth edges of a brighter one have its brightness too.
    image, target = blocks((12, 8, 42, 28), brightness=200)
    limit = network_size((HEIGHT, WIDTH), 40, 70)
    scales = []
    for number in range(60):
        result, objects = LargeScaleJitter((0.5, 2.0), (40,), 70, CONTINUOUS)(image, target, sample_rng(0, number))
        assert all(side <= most for side, most in zip(result.shape[1:], limit))
        ys, xs = torch.nonzero(result[0] > 100, as_tuple=True)
        bright = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        box = objects["boxes"][0]
        assert (box - bright).abs().max() <= 0.51
        if (box[:2] > 0).all() and (box[2:] < torch.tensor(limit[::-1])).all():
            scales.append((box[2] - box[0]) / 30 * HEIGHT / limit[0])
    assert 0.49 < min(scales) < 0.6
    assert 1.6 < max(scales) < 2.04


def test_colors_change_by_seed_and_number_only_and_boxes_do_not():
    image, target = blocks(*BOXES)
    distorted = [PhotometricDistortion(1.0)(image, target, sample_rng(0, number)) for number in range(8)]
    again = PhotometricDistortion(1.0)(image, target, sample_rng(0, 3))[0]
    assert torch.equal(distorted[3][0], again)
    assert len({result.float().mean().item() for result, _ in distorted}) > 4
    assert all(objects is target and result.dtype == torch.uint8 for result, objects in distorted)
    assert PhotometricDistortion(0.0)(image, target, sample_rng(0, 3))[0] is image


@both_conventions
def test_a_mosaic_has_four_images_whose_boxes_fit(convention):
    size, counts = (40, 60), set()
    image, target = blocks((5, 5, 55, 35), convention=convention, size=size, brightness=50)

    def other(rng):
        image, target = blocks((5, 5, 55, 35), convention=convention, size=size, brightness=200)
        return image, target | {"labels": torch.tensor([4])}

    for number in range(20):
        before = image.clone()
        mosaic, objects = Mosaic(1.0, convention)(image, target, sample_rng(0, number), other)
        assert torch.equal(image, before)
        assert mosaic.shape == image.shape
        assert sorted(objects["labels"].tolist()) == [1, 4, 4, 4]
        for box, label in zip(objects["boxes"], objects["labels"].tolist()):
            x1, y1, x2, y2 = (box + torch.tensor([0, 0, convention.extra, convention.extra])).round().int().tolist()
            inside = mosaic[0, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
            assert (inside == 50 * label).all()
        counts.add(tuple(objects["labels"].tolist()))
    assert len(counts) == 4


@both_conventions
def test_pasted_objects_have_their_pixels_and_covered_objects_disappear(convention):
    source = blocks((3, 2, 43, 32), convention=convention, brightness=200)
    source = source[0], source[1] | {"labels": torch.tensor([5])}
    image, target = blocks(*BOXES, convention=convention, brightness=40)
    dropped = 0
    for number in range(40):
        before = image.clone()
        pasted, objects = CopyPaste(1.0, 1, convention)(image, target, sample_rng(0, number), lambda rng: source)
        assert torch.equal(image, before)
        *others, last = objects["labels"].tolist()
        assert last == 5
        x, y, width, height = convention.to_xywh(objects["boxes"][-1]).int().tolist()
        assert (width, height) == (40, 30)
        assert (pasted[0, y : y + height, x : x + width] == 200).all()
        for k, box in enumerate(BOXES, start=1):
            area = (box[2] - box[0]) * (box[3] - box[1])
            assert (k in others) == ((pasted[0] == 40 * k).sum().item() >= 0.25 * area)
        dropped += len(BOXES) - len(others)
    assert dropped > 5


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda each: each.name)
def test_all_presets_accept_images_without_objects(convention):
    empty = blocks(convention=convention)
    for name in AUGMENT:
        settings = DataSettings(augment=name, quarter_turns=True, short_sides=(40,), max_size=80)
        for number in range(12):
            image, target = empty
            rng = sample_rng(0, number)
            for augmentation in training_augmentations(settings, convention):
                more = (lambda rng: empty,) if isinstance(augmentation, (Mosaic, CopyPaste)) else ()
                image, target = augmentation(image, target, rng, *more)
            assert target["boxes"].shape == (0, 4)
            assert max(image.shape) <= 80


def test_the_default_preset_is_the_papers():
    settings = DataSettings(short_sides=(600, 800), max_size=1333, flip_probability=0.3)
    assert training_augmentations(settings, CONTINUOUS) == [
        RandomResize((600, 800), 1333, "nearest"),
        RandomFlip(0.3, CONTINUOUS),
    ]
