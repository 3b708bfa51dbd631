import pytest
import torch

from cpm_rcnn.models.heads.scoring import InstanceScorer, instance_rescale, instance_score_loss, rescore


def test_loss_is_the_mean_squared_norm_to_one_minus_iou_and_iou():
    predictions, iou = torch.tensor([[0.2, 0.9], [0.0, 0.0]]), torch.tensor([0.7, 0.5])
    term = instance_score_loss(predictions, iou)
    expected = ((0.2 - 0.3) ** 2 + (0.9 - 0.7) ** 2 + 0.5**2 + 0.5**2) / 2
    assert (term.total / term.count).item() == pytest.approx(expected)
    assert instance_score_loss(predictions.bfloat16(), iou).total.dtype == torch.float32
    assert instance_score_loss(torch.stack([1 - iou, iou], dim=1), iou).total.item() == 0


def test_score_is_scaled_by_the_predicted_iou_held_within_0_and_1():
    scores = torch.tensor([0.8, 0.8, 0.8])
    predictions = torch.tensor([[9.0, 0.5], [9.0, -0.1], [9.0, 1.7]])
    torch.testing.assert_close(instance_rescale(scores, predictions), torch.tensor([0.4, 0.0, 0.8]))


def test_rescored_is_the_score_to_the_08_times_the_own_probability_to_the_02():
    scores, labels = torch.tensor([0.9, 0.5]), torch.tensor([2, 1])
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.4, 0.5, 0.1]])
    expected = torch.tensor([0.9**0.8 * 0.7**0.2, 0.5**0.8 * 0.5**0.2])
    torch.testing.assert_close(rescore(scores, probabilities.log(), labels), expected)


def test_worthless_box_keeps_a_finite_score_through_both():
    scores = instance_rescale(torch.tensor([0.9]), torch.tensor([[1.3, -0.3]]))
    assert rescore(scores, torch.tensor([[0.0, -200.0]]), torch.tensor([1])).item() == 0


def test_no_detections_stay_none():
    none = torch.zeros(0)
    assert instance_rescale(none, torch.zeros(0, 2)).shape == (0,)
    assert rescore(none, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert instance_score_loss(torch.zeros(0, 2), none).total.item() == 0


def test_scorer_predicts_two_numbers_a_roi_from_the_point_features():
    scorer = InstanceScorer(36 * 49)
    assert scorer(torch.randn(3, 36, 7, 7)).shape == (3, 2)
    assert scorer(torch.randn(0, 36, 7, 7)).shape == (0, 2)
