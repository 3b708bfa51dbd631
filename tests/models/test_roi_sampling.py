import pytest
import torch
from inputs import make_ground_truth

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.models.heads.roi_sampling import limit_crowded, next_stage_rois, sample_rois
from cpm_rcnn.models.structures import Rois, match_rois

FIRST, SECOND, THIRD = [10.0, 10, 50, 60], [60.0, 50, 110, 100], [30.0, 30, 90, 90]


@pytest.fixture
def ground_truth():
    """Two objects in the first image and one in the second."""
    return make_ground_truth([FIRST, SECOND], [THIRD])


@pytest.fixture
def rois(ground_truth):
    """30 boxes per image, from far away to close to its objects."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.linspace(2, 40, 30)[:, None] * torch.randn(30, 4, generator=generator)
    boxes = torch.cat([torch.tensor([FIRST, SECOND] * 15) + noise, torch.tensor([THIRD]) + noise])
    return Rois.of(boxes, torch.arange(2).repeat_interleave(30))


def test_sampled_labels_are_those_of_the_match_and_background_below_iou_half(rois, ground_truth):
    sampled = sample_rois(rois, ground_truth, CONTINUOUS, 64)
    match = match_rois(sampled.rois, ground_truth, CONTINUOUS)
    assert torch.equal(sampled.labels, torch.where(match.iou >= 0.5, match.labels, 0))
    assert torch.equal(sampled.match.boxes, match.boxes)
    assert set(sampled.labels.tolist()) == {0, 1, 2}


def test_sample_is_limited_per_image_and_at_most_a_quarter_is_positive(rois, ground_truth):
    candidates = rois.cat(ground_truth.rois()).cat(ground_truth.rois()).cat(ground_truth.rois())
    sampled = sample_rois(candidates, ground_truth, CONTINUOUS, 12)
    assert sampled.rois.images.bincount().tolist() == [12, 12]
    assert sampled.rois.images[sampled.labels > 0].bincount().tolist() == [3, 3]


def test_positives_are_limited_per_image_and_negatives_are_the_background(rois, ground_truth):
    sampled = sample_rois(rois.cat(ground_truth.rois()), ground_truth, CONTINUOUS, 64)
    positives, match = sampled.positives(2)
    assert positives.images.bincount().tolist() == [2, 2]
    assert torch.equal(CONTINUOUS.iou(positives.boxes, match.boxes), match.iou)
    assert (match.iou >= 0.5).all()
    assert torch.equal(sampled.negatives().boxes, sampled.rois.boxes[sampled.labels == 0])


def test_invalid_candidates_are_never_sampled(rois, ground_truth):
    torch.manual_seed(0)
    expected = sample_rois(rois, ground_truth, CONTINUOUS, 64)
    invalid = rois.with_boxes(rois.boxes + 1).where(torch.zeros(len(rois), dtype=torch.bool))
    torch.manual_seed(0)
    sampled = sample_rois(invalid.cat(rois), ground_truth, CONTINUOUS, 64)
    assert torch.equal(sampled.rois.boxes, expected.rois.boxes)
    assert torch.equal(sampled.labels, expected.labels)


def test_sampling_from_images_without_objects_gives_only_background(rois):
    sampled = sample_rois(rois, make_ground_truth([], []), CONTINUOUS, 16)
    assert sampled.labels.tolist() == [0] * 32
    positives, _ = sampled.positives(8)
    assert len(positives) == 0


def test_next_stage_gets_the_decoded_boxes_and_each_ground_truth_box_once(ground_truth):
    start = torch.tensor([FIRST, FIRST, THIRD, THIRD]) + torch.tensor([[0.0], [2], [0], [3]])
    rois = Rois.of(start, torch.tensor([0, 0, 1, 1]))
    decoded = rois.with_boxes(rois.boxes + 1)
    following, match = next_stage_rois(
        rois, decoded, match_rois(rois, ground_truth, CONTINUOUS), ground_truth, CONTINUOUS
    )
    # RoIs 0 and 2 were ground-truth boxes.
    assert following.boxes.tolist() == [*decoded.boxes[[1, 3]].tolist(), FIRST, SECOND, THIRD]
    assert following.images.tolist() == [0, 1, 0, 0, 1]
    assert following.valid.all()
    again = match_rois(following, ground_truth, CONTINUOUS)
    assert torch.equal(match.iou, again.iou)
    assert torch.equal(match.boxes, again.boxes)
    assert torch.equal(match.labels, again.labels)


def test_decoded_box_is_matched_again_and_can_change_its_object(ground_truth):
    rois = Rois.of(torch.tensor([FIRST]) + 1, torch.tensor([0]))
    decoded = rois.with_boxes(torch.tensor([SECOND]) + 1)
    _, match = next_stage_rois(rois, decoded, match_rois(rois, ground_truth, CONTINUOUS), ground_truth, CONTINUOUS)
    assert match.labels.tolist() == [2, 1, 2, 1]


def test_rois_of_later_stages_are_limited_in_images_with_more_objects_decoded_boxes_first():
    boxes = [[k, k, k + 20, k + 20] for k in range(9)]
    objects = make_ground_truth(boxes, boxes[:3])
    decoded = Rois.of(torch.tensor([[1.0, 0, 20, 20], [3, 2, 20, 20], [0, 1, 20, 20]]), torch.tensor([0, 0, 1]))
    (rois,) = decoded.cat(objects.rois()).compact()
    match = match_rois(rois, objects, CONTINUOUS)
    chosen = set()
    for _ in range(20):
        (kept,) = limit_crowded(rois, match, objects, 4).compact()
        assert kept.images.tolist() == [0, 0, 1, 0, 0, 1, 1, 1]
        assert torch.equal(kept.boxes[:3], decoded.boxes)
        chosen |= {tuple(box) for box in kept.boxes[3:5].tolist()}
    assert len(chosen) == 9
    # Invalid RoIs do not count.
    (kept,) = limit_crowded(rois.where(torch.arange(len(rois)) > 0), match, objects, 3).compact()
    assert kept.images.tolist() == [0, 1, 0, 0, 1, 1, 1]
    assert torch.equal(kept.boxes[:2], decoded.boxes[1:])


def test_limit_of_later_stages_that_no_image_exceeds_draws_no_random_number(rois, ground_truth):
    state = torch.get_rng_state()
    assert limit_crowded(rois, match_rois(rois, ground_truth, CONTINUOUS), ground_truth, 2) is rois
    assert torch.equal(torch.get_rng_state(), state)
