"""Boxes drawn on images, and sheets of pictures."""

import pytest
import torch
from PIL import Image

from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting.pictures import draw, save, sheet

NAMES = ["cat", "dog with a long name"]


def _found(boxes, scores, labels):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def _gray(height, width):
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def _changed(picture):
    """First and last row, first and last column of the pixels that were drawn on a gray image."""
    rows, columns = (picture != 128).any(0).nonzero(as_tuple=True)
    return rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()


def test_a_box_is_drawn_at_its_coordinates():
    picture = draw(_gray(500, 600), _found([[100, 200, 300, 400]], [0.9], [1]), NAMES)
    assert picture.shape == (3, 500, 600)
    assert picture.dtype == torch.uint8
    top, bottom, left, right = _changed(picture)
    assert (bottom, left, right) == (400, 100, 300)
    assert 170 < top < 200  # the tag is above the box
    assert (picture[:, 210:390, 110:290] == 128).all()


def test_a_small_image_is_enlarged_together_with_its_boxes():
    picture = draw(_gray(192, 256), _found([[20, 50, 120, 150]], [0.9], [1]), NAMES)
    assert picture.shape == (3, 384, 512)
    assert _changed(picture)[1:] == (300, 40, 240)


def test_detections_with_a_score_below_the_minimum_are_not_drawn():
    image = _gray(500, 500)
    found = _found([[10, 20, 90, 90], [10, 20, 90, 90]], [0.29, 0.1], [1, 2])
    assert torch.equal(draw(image, found, NAMES), image)
    assert not torch.equal(draw(image, found, NAMES, min_score=0.2), image)


def test_each_class_can_have_its_own_minimum_score():
    image = _gray(500, 500)
    found = _found([[10, 20, 90, 90], [200, 220, 390, 390]], [0.4, 0.4], [1, 2])
    second = {name: value[1:] for name, value in found.items()}
    assert torch.equal(draw(image, found, NAMES, min_score=[0.5, 0.4]), draw(image, second, NAMES, min_score=0))
    assert torch.equal(draw(image, found, NAMES, min_score=[float("inf"), 0.5]), image)


def test_the_given_image_is_not_changed():
    image = _gray(500, 500)
    draw(image, _found([[10, 20, 90, 90]], [0.9], [1]), NAMES)
    assert (image == 128).all()


def test_a_class_has_the_same_color_in_every_picture_and_the_palette_repeats():
    names = [str(k) for k in range(1, 101)]
    colors = [
        tuple(draw(_gray(480, 480), _found([[99, 99, 300, 300]], [0.9], [k]), names)[:, 300, 200].tolist())
        for k in (1, 2, 1, 100)
    ]
    assert colors[0] == colors[2] != colors[1]
    assert colors[3] != (128, 128, 128)


def test_tags_are_inside_the_image_and_do_not_overlap():
    found = _found([[0, 0, 479, 479], [0, 0, 479, 479], [460, 470, 479, 479]], [0.9, 0.8, 0.7], [2, 1, 2])
    picture = draw(_gray(480, 480), found, NAMES)
    # The text of a tag is black: count its pixels, which would be fewer if a tag were cut off or covered.
    alone = sum(
        (draw(_gray(480, 480), _found([[100, 200, 400, 300]], [s], [k]), NAMES) == 0).all(0).sum().item()
        for s, k in ((0.9, 2), (0.8, 1), (0.7, 2))
    )
    assert (picture == 0).all(0).sum().item() == pytest.approx(alone, abs=3)


def _tag_height(boxes):
    """The height of the tag above the first box on a picture of 1500 x 2000 pixels."""
    picture = draw(_gray(1500, 2000), _found(boxes, [0.9] * len(boxes), [1] * len(boxes)), NAMES)
    x1, y1 = boxes[0][:2]
    column = (picture[:, :y1, x1 + 1] != 128).any(0)
    return column.sum().item()


def test_tags_suit_the_picture_but_are_small_if_the_objects_are():
    large = [[300, 400, 900, 1000]]
    small = [[300 + 90 * k, 400, 340 + 90 * k, 440] for k in range(5)]
    assert 40 < _tag_height(large) < 55
    assert 13 < _tag_height(small) < 25
    assert _tag_height([*large, *large, *small[:1]]) == _tag_height(large)  # the median decides


def test_where_there_is_no_free_place_the_tag_of_the_better_detection_is_on_top():
    first, second = ([[1, 1, 70, 30]], [0.9], [1]), ([[2, 2, 71, 31]], [0.8], [2])
    image = _gray(480, 480)[:, :32, :80]
    alone = draw(image, _found(*first), NAMES)
    both = draw(image, _found(first[0] * 9 + second[0], [0.9] * 9 + [0.8], [1] * 9 + [2]), NAMES)
    tag = (slice(None), slice(0, 12), slice(10, 60))
    assert torch.equal(both[tag], alone[tag])


def test_ground_truth_boxes_are_dashed_in_black_and_white():
    picture = draw(
        _gray(500, 500), _found([], [], []), NAMES, ground_truth={"boxes": torch.tensor([[50.0, 50, 400, 300]])}
    )
    edge = {tuple(color) for color in picture[:, 50, 50:400].T.tolist()}
    assert edge == {(0, 0, 0), (255, 255, 255)}
    assert _changed(picture) == (50, 300, 50, 400)


def test_boxes_beyond_the_image_and_inverted_boxes_can_be_drawn():
    found = _found([[-50, -50, 2000, 2000], [300, 300, 299, 280], [10, 10, 10, 10]], [0.9, 0.8, 0.7], [1, 1, 2])
    assert draw(_gray(500, 400), found, NAMES).shape == (3, 500, 400)


def test_a_sheet_shows_pictures_of_different_sizes_completely():
    pictures = [torch.full((3, h, w), v, dtype=torch.uint8) for h, w, v in ((40, 60, 201), (80, 30, 202), (9, 9, 203))]
    grid = sheet(pictures, columns=2)
    assert grid.dtype == torch.uint8
    for picture in pictures:
        assert (grid == picture[0, 0, 0]).sum() == picture.numel()
    assert grid.shape == (3, 2 * 80 + 3 * 6, 2 * 60 + 3 * 6)


def test_a_sheet_of_few_pictures_has_no_empty_columns():
    assert sheet([_gray(20, 30)], columns=4).shape == (3, 20 + 12, 30 + 12)


def test_a_saved_picture_can_be_read_again(tmp_path):
    picture = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    save(picture, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == (30, 20)
        assert image.getpixel((7, 3)) == tuple(picture[:, 3, 7].tolist())


def test_an_unknown_file_suffix_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"a\.nonsense: cannot write"):
        save(_gray(5, 5), tmp_path / "a.nonsense")


def test_the_size_of_the_text_can_be_given():
    found = _found([[300, 400, 900, 1000]], [0.9], [1])
    large, small = (draw(_gray(1500, 2000), found, NAMES, size=size) for size in (None, 15))
    assert (large != 128).sum() > 2 * (small != 128).sum()
