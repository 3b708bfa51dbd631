"""Soft-NMS against its definition."""

import pytest
import torch

from cpm_rcnn.inference.soft_nms import soft_nms


def _one_by_one(boxes, scores, labels, threshold, min_score):
    """The definition, box by box in Python: (label, score, box) of every selected box, sorted."""

    def iou(a, b):
        w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
        return w * h / union if union > 0 else 0.0

    picks = []
    for label in set(labels):
        rest = [[s, b] for s, b, k in zip(scores, boxes, labels) if k == label]
        while rest:
            pick = max(rest, key=lambda item: item[0])
            rest = [item for item in rest if item is not pick]
            if pick[0] <= min_score:
                break
            picks.append((label, round(pick[0], 5), [round(x, 3) for x in pick[1]]))
            for item in rest:
                overlap = iou(pick[1], item[1])
                if overlap > threshold:
                    item[0] *= 1 - overlap
    return sorted(picks)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_all_classes_in_parallel_equal_the_definition_box_by_box(seed, threshold):
    rng = torch.Generator().manual_seed(seed)
    count = 60
    corner = torch.rand(count, 2, generator=rng, dtype=torch.float64) * 40
    boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=rng) * 40], 1)
    scores = torch.rand(count, generator=rng, dtype=torch.float64)
    labels = torch.randint(1, 5, (count,), generator=rng) * 3

    kept, decayed, classes = soft_nms(boxes, scores, labels, threshold, min_score=0.05)

    picks = sorted(
        (label, round(score, 5), [round(x, 3) for x in box])
        for label, score, box in zip(classes.tolist(), decayed.tolist(), kept.tolist())
    )
    assert picks == _one_by_one(boxes.tolist(), scores.tolist(), labels.tolist(), threshold, 0.05)
    assert (decayed.diff() <= 0).all()


def test_an_identical_box_is_dropped_in_the_same_class_and_kept_in_another():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(3, 1)
    _, scores, labels = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 2]))
    assert scores.tolist() == pytest.approx([0.9, 0.7])
    assert labels.tolist() == [1, 2]


def test_the_score_of_a_partly_overlapping_box_is_reduced_linearly():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 8], [50.0, 50, 60, 60]])
    kept, scores, _ = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.3]), torch.tensor([1, 1, 1]))
    assert scores.tolist() == pytest.approx([0.9, 0.3, 0.8 * 0.2])
    assert torch.equal(kept, boxes[[0, 2, 1]])


def test_no_boxes_give_no_boxes():
    boxes, scores, labels = soft_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert boxes.shape == (0, 4)
    assert scores.shape == labels.shape == (0,)


def test_scores_and_boxes_that_are_not_finite_are_dropped_and_the_rest_of_their_class_is_kept():
    boxes = torch.tensor([[10.0 * k, 0, 10.0 * k + 9, 9] for k in range(5)])
    boxes[3, 1] = float("nan")
    boxes[4, 2] = float("inf")
    scores = torch.tensor([0.9, float("nan"), 0.7, 0.8, 0.6])
    kept, found, labels = soft_nms(boxes, scores, torch.tensor([1, 1, 1, 1, 2]))
    assert found.tolist() == pytest.approx([0.9, 0.7])
    assert torch.equal(kept, boxes[[0, 2]])
    assert labels.tolist() == [1, 1]
    assert [len(part) for part in soft_nms(boxes, scores * float("nan"), torch.ones(5).long())] == [0, 0, 0]


def test_boxes_without_area_do_not_suppress_each_other():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5.0, 5, 5, 5]])
    _, scores, _ = soft_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 1]))
    assert scores.tolist() == pytest.approx([0.9, 0.8])
