import pytest
import torch

from cpm_rcnn.models.structures import Rois, GroundTruth, match_rois
from cpm_rcnn.boxes import CONVENTIONS

both = pytest.mark.parametrize("pixels", CONVENTIONS.values(), ids=lambda pixels: pixels.name)


def target(*boxes, labels=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or range(1, len(boxes) + 1), dtype=torch.int64).reshape(-1)[: len(boxes)],
    }


A, B, C = (0, 0, 10, 10), (20, 20, 40, 30), (5, 5, 15, 15)


def test_truth_is_padded_to_the_image_with_most_objects():
    truth = GroundTruth.stack([target(A), target(), target(B, C, labels=[7, 9])])
    assert truth.boxes.dtype == torch.float32
    assert truth.boxes.tolist() == [[[*A], [0] * 4], [[0] * 4, [0] * 4], [[*B], [*C]]]
    assert truth.labels.tolist() == [[1, 0], [0, 0], [7, 9]]
    assert truth.valid.tolist() == [[True, False], [False, False], [True, True]]


@pytest.mark.parametrize("images", [1, 3])
def test_truth_without_any_object_is_one_row_of_padding_an_image(images):
    truth = GroundTruth.stack([target()] * images)
    assert truth.boxes.shape == (images, 1, 4)
    assert truth.labels.shape == truth.valid.shape == (images, 1)
    assert not truth.valid.any()
    assert truth.rois().boxes.shape == (0, 4)


def test_truths_own_rois_are_its_boxes_without_the_padding():
    rois = GroundTruth.stack([target(A), target(), target(B, C)]).rois()
    assert rois.boxes.tolist() == [[*A], [*B], [*C]]
    assert rois.images.tolist() == [0, 2, 2]


def test_truth_takes_boxes_of_other_dtypes():
    odd = {"boxes": torch.tensor([A], dtype=torch.float64), "labels": torch.tensor([3], dtype=torch.int32)}
    truth = GroundTruth.stack([odd, target(B, C)])
    assert truth.boxes.dtype == torch.float32
    assert truth.labels.dtype == torch.int64


@both
def test_each_roi_meets_the_best_object_of_its_own_image_only(pixels):
    truth = GroundTruth.stack([target(A, C, labels=[4, 5]), target(B, labels=[6]), target()])
    rois = Rois(torch.tensor([[1.0, 1, 10, 10], [6, 6, 15, 15], A, B, B, A]), torch.tensor([0, 0, 1, 1, 0, 2]))
    match = match_rois(rois, truth, convention)
    assert match.labels.tolist()[:4] == [4, 5, 6, 6]
    assert match.boxes.tolist()[:4] == [[*A], [*C], [*B], [*B]]
    boxes = torch.tensor([A, C, B, B], dtype=torch.float32)
    torch.testing.assert_close(match.iou[:4], convention.iou(rois.boxes[:4], boxes))
    assert match.iou.tolist()[2:] == [0, 1, 0, -1]


@both
def test_roi_of_an_image_without_objects_matches_nothing(pixels):
    match = match_rois(
        Rois(torch.tensor([A, (0, 0, 0, 0)]).float(), torch.tensor([0, 0])), GroundTruth.stack([target()]), pixels
    )
    assert match.iou.tolist() == [-1, -1]
    assert match.labels.tolist() == [0, 0]
    assert match.boxes.tolist() == [[0] * 4] * 2


@both
def test_padding_is_never_the_match_even_of_a_roi_on_it(pixels):
    truth = GroundTruth.stack([target(B, labels=[3]), target(A, B, C)])
    match = match_rois(Rois(torch.zeros(1, 4), torch.tensor([0])), truth, convention)
    assert match.boxes.tolist() == [[*B]]
    assert (match.iou.item(), match.labels.item()) == (0, 3)


def test_no_rois_match_nothing():
    match = match_rois(
        Rois(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), GroundTruth.stack([target(A)]), CONVENTIONS["continuous"]
    )
    assert (match.iou.shape, match.boxes.shape, match.labels.shape) == ((0,), (0, 4), (0,))


def test_keep_takes_masks_and_indices_and_join_appends():
    rois = Rois(torch.tensor([A, B, C]).float(), torch.tensor([0, 1, 0]))
    assert rois.keep(torch.tensor([False, True, True])).boxes.tolist() == [[*B], [*C]]
    assert rois.keep(torch.tensor([2, 0])).boxes.tolist() == [[*C], [*A]]
    joined = rois.join(rois.keep(torch.tensor([1])))
    assert joined.boxes.tolist() == [[*A], [*B], [*C], [*B]]
    assert joined.images.tolist() == [0, 1, 0, 1]
