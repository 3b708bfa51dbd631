from dataclasses import replace

import pytest
import torch
from inputs import LargestTensor, make_ground_truth, make_target, no_rois, random_rois

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.models import structures
from cpm_rcnn.models.structures import Detections, GroundTruth, Match, Rois, match_rois
from emulated_device import EmulatedDevice, on_device, on_host

A, B, C = (0, 0, 10, 10), (20, 20, 40, 30), (5, 5, 15, 15)


def make_rois():
    """Four RoIs, the second of which is invalid."""
    boxes = torch.tensor([A, B, C, A], dtype=torch.float32)
    return Rois(boxes, torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, True]))


def make_match():
    """The match of :func:`make_rois`; row i has label i + 1."""
    return Match(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([C, A, B, B]).float(), torch.tensor([1, 2, 3, 4]))


def make_detections():
    boxes = torch.tensor([A, B, C, A], dtype=torch.float32)
    return Detections(
        boxes,
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0.9, 0.8, 0.7, 0.6]),
        torch.tensor([1, 2, 3, 4]),
        torch.ones(4, dtype=torch.bool),
        class_scores=torch.tensor([0.5, 0.4, 0.3, 0.2]),
        predicted_iou=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        rsm_probability=torch.tensor([0.6, 0.7, 0.8, 0.9]),
    )


all_rows = pytest.mark.parametrize(
    "make", [make_rois, make_match, make_detections], ids=["Rois", "Match", "Detections"]
)


def fields_of(rows):
    return [getattr(rows, name) for name in rows.__dataclass_fields__ if name not in rows._shared]


@all_rows
@pytest.mark.parametrize(
    ("index", "numbers"),
    [
        (torch.tensor([False, True, False, True]), [1, 3]),
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (slice(1, 3), [1, 2]),
        (torch.zeros(4, dtype=torch.bool), []),
    ],
    ids=["mask", "indices", "slice", "empty"],
)
def test_indexing_takes_the_same_rows_of_every_field(make, index, numbers):
    rows = make()
    chosen = rows[index]
    assert type(chosen) is type(rows)
    assert len(chosen) == len(numbers)
    for before, after in zip(fields_of(rows), fields_of(chosen), strict=True):
        assert torch.equal(after, before[numbers])


@all_rows
def test_cat_appends_every_field(make):
    rows = make()
    both = rows.cat(rows[torch.tensor([1])])
    assert type(both) is type(rows)
    assert len(both) == 5
    for before, after in zip(fields_of(rows), fields_of(both), strict=True):
        assert torch.equal(after, before[[0, 1, 2, 3, 1]])


def test_where_only_makes_rows_invalid():
    rois = make_rois().where(torch.tensor([True, True, False, True]))
    assert rois.valid.tolist() == [True, False, False, True]
    assert torch.equal(rois.boxes, make_rois().boxes)
    assert torch.equal(rois.images, make_rois().images)


def test_image_sizes_are_shared_by_all_rows_and_clip_the_boxes():
    sizes = torch.tensor([[30, 40], [50, 60], [10, 20], [70, 80]])
    rois = replace(make_rois(), image_sizes=sizes, boxes=torch.tensor([[-5.0, -5.0, 100.0, 100.0]]).expand(4, 4))
    chosen = rois[torch.tensor([2, 0])].cat(rois[:1])
    assert chosen.image_sizes is sizes
    expected = [[0, 0, sizes[image][1], sizes[image][0]] for image in chosen.images]
    assert torch.equal(chosen.clip(CONTINUOUS).boxes, torch.tensor(expected).float())


def test_with_boxes_keeps_images_and_validity():
    rois = make_rois().with_boxes(torch.ones(4, 4))
    assert torch.equal(rois.boxes, torch.ones(4, 4))
    assert torch.equal(rois.images, make_rois().images)
    assert torch.equal(rois.valid, make_rois().valid)


def test_compact_drops_exactly_the_invalid_rows_and_the_same_rows_of_the_others():
    rois, match, numbers = make_rois().compact(make_match(), torch.arange(4))
    assert rois.images.tolist() == [0, 2, 3]
    assert rois.valid.all()
    assert match.labels.tolist() == [1, 3, 4]
    assert match.iou.tolist() == pytest.approx([0.1, 0.3, 0.4])
    assert numbers.tolist() == [0, 2, 3]


def test_compact_of_valid_rows_changes_nothing_and_of_invalid_rows_leaves_none():
    (same,) = Rois.of(make_rois().boxes, make_rois().images).compact()
    assert torch.equal(same.boxes, make_rois().boxes)
    (none,) = make_rois().where(torch.zeros(4, dtype=torch.bool)).compact()
    assert (none.boxes.shape, none.images.shape, none.valid.shape) == ((0, 4), (0,), (0,))


def test_bounds_of_the_number_of_valid_rows_add_up_and_the_smaller_one_counts():
    rois = Rois(torch.zeros(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(6, dtype=torch.bool), at_most=(3, 2))
    everything = torch.ones(6, dtype=torch.bool)
    assert rois.cat(make_ground_truth([A], [B, C]).rois()).at_most == (4, 4)
    assert rois.cat(make_rois()).at_most is None
    assert rois[torch.tensor([0, 0, 1])].at_most is None
    assert rois.where(everything).at_most == (3, 2)
    assert rois.where(everything, at_most=2).at_most == (2, 2)
    assert rois.where(everything, at_most=(1, 5)).at_most == (1, 2)
    assert make_rois().where(torch.ones(4, dtype=torch.bool), at_most=2).at_most is None
    assert make_rois().where(torch.ones(4, dtype=torch.bool), at_most=(1, 2)).at_most == (1, 2)
    assert rois.with_boxes(rois.boxes + 1).at_most == (3, 2)


def test_compact_on_an_accelerator_keeps_as_many_rows_as_can_be_valid_and_valid_ones_first():
    numbers = torch.arange(6)
    mask = torch.tensor([False, True, False, True, True, False])
    with EmulatedDevice() as device:
        boxes, images = on_device(torch.zeros(6, 4)), on_device(torch.tensor([0, 0, 0, 1, 1, 1]))
        rois = Rois(boxes, images, on_device(mask))
        assert rois.compact()[0] is rois
        bounded, kept = rois.where(on_device(mask), at_most=(2, 3)).compact(on_device(numbers))
        assert not device.waits
    assert bounded.at_most == (2, 3)
    assert on_host(kept).tolist() == [1, 3, 4, 0, 2]
    assert on_host(bounded.valid).tolist() == [True, True, True, False, False]
    assert on_host(bounded.images).tolist() == [0, 1, 1, 0, 0]


def test_ground_truth_is_padded_to_the_image_with_most_objects():
    ground_truth = GroundTruth.stack([make_target(A), make_target(), make_target(B, C, labels=[7, 9])])
    assert ground_truth.boxes.dtype == torch.float32
    assert ground_truth.boxes.tolist() == [[[*A], [0] * 4], [[0] * 4, [0] * 4], [[*B], [*C]]]
    assert ground_truth.labels.tolist() == [[1, 0], [0, 0], [7, 9]]
    assert ground_truth.valid.tolist() == [[True, False], [False, False], [True, True]]


@pytest.mark.parametrize("images", [1, 3])
def test_ground_truth_without_objects_has_one_row_of_padding_per_image(images):
    ground_truth = GroundTruth.stack([make_target()] * images)
    assert ground_truth.boxes.shape == (images, 1, 4)
    assert ground_truth.labels.shape == ground_truth.valid.shape == (images, 1)
    assert not ground_truth.valid.any()
    (rois,) = ground_truth.rois().compact()
    assert rois.boxes.shape == (0, 4)


def test_rois_of_ground_truth_are_its_boxes_and_padding_is_invalid():
    rois = make_ground_truth([A], [], [B, C]).rois()
    assert rois.images.tolist() == [0, 0, 1, 1, 2, 2]
    (rois,) = rois.compact()
    assert rois.boxes.tolist() == [[*A], [*B], [*C]]
    assert rois.images.tolist() == [0, 2, 2]


def test_ground_truth_converts_other_dtypes():
    other = {"boxes": torch.tensor([A], dtype=torch.float64), "labels": torch.tensor([3], dtype=torch.int32)}
    ground_truth = GroundTruth.stack([other, make_target(B, C)])
    assert ground_truth.boxes.dtype == torch.float32
    assert ground_truth.labels.dtype == torch.int64


def test_each_roi_matches_the_best_object_of_its_own_image(convention):
    ground_truth = GroundTruth.stack([make_target(A, C, labels=[4, 5]), make_target(B, labels=[6]), make_target()])
    rois = Rois.of(torch.tensor([[1.0, 1, 10, 10], [6, 6, 15, 15], A, B, B, A]), torch.tensor([0, 0, 1, 1, 0, 2]))
    match = match_rois(rois, ground_truth, convention)
    assert match.labels.tolist()[:4] == [4, 5, 6, 6]
    assert match.boxes.tolist()[:4] == [[*A], [*C], [*B], [*B]]
    boxes = torch.tensor([A, C, B, B], dtype=torch.float32)
    torch.testing.assert_close(match.iou[:4], convention.iou(rois.boxes[:4], boxes))
    assert match.iou.tolist()[2:] == [0, 1, 0, -1]


def test_roi_of_an_image_without_objects_has_no_match(convention):
    rois = Rois.of(torch.tensor([A, (0, 0, 0, 0)]).float(), torch.tensor([0, 0]))
    match = match_rois(rois, make_ground_truth([]), convention)
    assert match.iou.tolist() == [-1, -1]
    assert match.labels.tolist() == [0, 0]
    assert match.boxes.tolist() == [[0] * 4] * 2


def test_padding_is_never_a_match_even_for_a_roi_with_the_same_box(convention):
    ground_truth = GroundTruth.stack([make_target(B, labels=[3]), make_target(A, B, C)])
    match = match_rois(Rois.of(torch.zeros(1, 4), torch.tensor([0])), ground_truth, convention)
    assert match.boxes.tolist() == [[*B]]
    assert (match.iou.item(), match.labels.item()) == (0, 3)


def test_no_rois_have_no_match():
    match = match_rois(no_rois(), make_ground_truth([A]), CONTINUOUS)
    assert (match.iou.shape, match.boxes.shape, match.labels.shape) == ((0,), (0, 4), (0,))


def test_match_and_its_memory_do_not_depend_on_how_many_rois_are_compared_at_once(convention, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ground_truth = make_ground_truth(random_rois(300, 1, generator).boxes.tolist(), [A])
    rois = random_rois(500, 2, generator)
    expected = match_rois(rois, ground_truth, convention)
    for chunk, elements in ((1, 4 * 300), (7000, 4 * 23 * 300)):  # 23 RoIs with the 4 numbers of each object
        monkeypatch.setattr(structures, "_CHUNK", chunk)
        with LargestTensor() as largest:
            match = match_rois(rois, ground_truth, convention)
        assert all(torch.equal(a, b) for a, b in zip(fields_of(match), fields_of(expected)))
        assert largest.elements == max(elements, 4 * 500)
