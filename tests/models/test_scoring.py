from typing import NamedTuple

import pytest
import torch
from inputs import head_inputs, make_ground_truth, random_pyramid
from torch import Tensor, nn

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.models.heads.classification import probability_of
from cpm_rcnn.models.heads.refinement import RefinementStage, refine
from cpm_rcnn.models.heads.scoring import (
    InstanceScoring,
    Rescoring,
    instance_score_loss,
    predicted_iou,
    release_weights,
    rescore,
)
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.pooling import PyramidRoIAlign
from cpm_rcnn.models.structures import Match, Rois, match_rois


class ShiftOutput(NamedTuple):
    features: Tensor
    shift: Tensor


class ShiftStage(RefinementStage):
    """A stage without a grid: moves each RoI by what a linear layer predicts from 2x2 pooled features."""

    def __init__(self, inputs):
        super().__init__()
        self.pool = PyramidRoIAlign(2, inputs.strides, inputs.convention)
        self.predictor = nn.Linear(4 * inputs.channels, 1)

    def forward(self, features, rois):
        pooled = self.pool(features, rois)
        return ShiftOutput(pooled.relu(), self.predictor(pooled.flatten(1)))

    def decode(self, output, rois):
        return rois.with_boxes(rois.boxes + output.shift.detach())

    def losses(self, output, rois, match):
        error = (rois.boxes + output.shift - match.boxes).abs().sum(dim=1)
        return LossTerm(torch.where(rois.valid, error, 0.0).sum(), rois.valid.sum())


@pytest.fixture(scope="module")
def stages():
    torch.manual_seed(0)
    return [ShiftStage(head_inputs()), ShiftStage(head_inputs())]


@pytest.fixture(scope="module")
def features():
    return random_pyramid()


@pytest.fixture(scope="module")
def rois():
    return Rois.of(torch.tensor([[5.0, 6, 50, 70], [20, 10, 90, 60], [40, 40, 100, 110]]), torch.tensor([0, 1, 1]))


@pytest.fixture(scope="module")
def ground_truth():
    return make_ground_truth([[5, 5, 50, 70]], [[22, 12, 90, 60], [0, 0, 5, 5]])


def test_cascade_passes_the_decoded_boxes_to_the_next_stage(stages, features, rois):
    refined, outputs = refine(stages, features, rois)
    torch.testing.assert_close(refined.boxes, (rois.boxes + outputs[0].shift + outputs[1].shift).detach())
    again = stages[1](features, stages[0].decode(outputs[0], rois))
    torch.testing.assert_close(outputs[1].shift, again.shift)
    assert torch.equal(refined.images, rois.images)


def test_cascade_without_stages_changes_nothing(features, rois):
    refined, outputs = refine([], features, rois)
    assert (refined, outputs) == (rois, [])


def test_ism_attaches_to_stages_without_a_grid(stages, features, rois, ground_truth):
    _, outputs = refine(stages, features, rois)
    ism = InstanceScoring(in_features=8 * 2 * 2)
    match = match_rois(rois, ground_truth, CONTINUOUS)
    term = ism.loss(outputs[-1].features, rois, match)
    predictions = ism(outputs[-1].features)
    target = torch.stack([1 - match.iou, match.iou], dim=1)
    torch.testing.assert_close(term.total, (predictions - target).square().sum())
    assert term.count == 3
    term.total.backward()
    assert all(p.grad.any() for p in ism.parameters())
    torch.testing.assert_close(ism.predicted_iou(outputs[-1].features), predictions[:, 1].clamp(0, 1))


def test_rsm_attaches_to_stages_without_a_grid(stages, features, rois, ground_truth):
    refined, _ = refine(stages, features, rois)
    rsm = Rescoring(head_inputs(), mlp_channels=16, samples=32)
    negatives = Rois.of(torch.tensor([[90.0, 90, 120, 120]]), torch.tensor([0]))
    term = rsm.loss(features, negatives.cat(rois), ground_truth)
    # RoIs 0 and 1 are positive, RoI 2 and the negative are background.
    assert term.count == 4
    torch.testing.assert_close(term.total / term.count, torch.tensor(4.0).log(), rtol=0.1, atol=0)
    term.total.backward()
    assert all(p.grad is not None for p in rsm.parameters())
    labels = torch.tensor([1, 2, 3])
    expected = torch.softmax(rsm(features, refined), dim=1)[torch.arange(3), labels]
    torch.testing.assert_close(rsm.probability(labels, features, refined), expected)


def test_ism_loss_is_the_mean_squared_error_to_one_minus_iou_and_iou():
    predictions, iou = torch.tensor([[0.2, 0.9], [0.0, 0.0]]), torch.tensor([0.7, 0.5])
    valid = torch.tensor([True, True])
    term = instance_score_loss(predictions, iou, valid)
    expected = ((0.2 - 0.3) ** 2 + (0.9 - 0.7) ** 2 + 0.5**2 + 0.5**2) / 2
    assert (term.total / term.count).item() == pytest.approx(expected)
    assert instance_score_loss(predictions.bfloat16(), iou, valid).total.dtype == torch.float32
    assert instance_score_loss(torch.stack([1 - iou, iou], dim=1), iou, valid).total.item() == 0


def test_the_release_s_ism_weights_favor_the_first_two_rois_of_the_first_image():
    """Of 40 valid RoIs, those two count about 10 times, exact ground truth 0.3 times and the others 0.5 times."""
    count = 42
    images = torch.arange(count) // 21
    images = 1 - images  # image 1 comes first
    rois = Rois.of(torch.rand(count, 4), images).where((torch.arange(count) != 21) & (torch.arange(count) != 40))
    boxes = rois.boxes + 1
    boxes[[3, 30]] = rois.boxes[[3, 30]]
    expected = torch.full((count,), 0.5)
    expected[[3, 30]] = 0.3
    expected[[22, 23]] = 10.5
    weights = release_weights(rois, Match(torch.ones(count), boxes, torch.ones(count, dtype=torch.int64)))
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("count", [0, 1])
def test_the_release_s_ism_weights_exist_for_fewer_than_two_rois(count):
    rois = Rois.of(torch.zeros(count, 4), torch.zeros(count, dtype=torch.int64))
    match = Match(torch.ones(count), torch.ones(count, 4), torch.ones(count, dtype=torch.int64))
    assert release_weights(rois, match).tolist() == [0.75] * count


def test_ism_uses_the_weights_that_it_was_told_to(rois, ground_truth):
    match = match_rois(rois, ground_truth, CONTINUOUS)
    features, totals = torch.randn(3, 8), {}
    for name in ("equal", "release"):
        torch.manual_seed(0)
        ism = InstanceScoring(8, name)
        totals[name] = ism.loss(features, rois, match).total
        weights = {"equal": torch.ones(3), "release": release_weights(rois, match)}[name]
        error = (ism(features) - torch.stack([1 - match.iou, match.iou], dim=1)).square().sum(dim=1)
        torch.testing.assert_close(totals[name], (error * weights).sum())
    assert totals["equal"] != totals["release"]


def test_the_predicted_iou_is_the_second_prediction_clamped_to_0_and_1():
    predictions = torch.tensor([[9.0, 0.5], [9.0, -0.1], [9.0, 1.7]])
    torch.testing.assert_close(predicted_iou(predictions), torch.tensor([0.5, 0.0, 1.0]))


def test_rsm_multiplies_the_score_to_the_08_with_the_probability_of_its_label_to_the_02():
    scores, labels = torch.tensor([0.9, 0.5]), torch.tensor([2, 1])
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.4, 0.5, 0.1]])
    expected = torch.tensor([0.9**0.8 * 0.7**0.2, 0.5**0.8 * 0.5**0.2])
    torch.testing.assert_close(rescore(scores, probability_of(probabilities.log(), labels)), expected)


def test_score_stays_finite_when_both_predictions_are_zero():
    scores = 0.9 * predicted_iou(torch.tensor([[1.3, -0.3]]))
    assert rescore(scores, probability_of(torch.tensor([[0.0, -200.0]]), torch.tensor([1]))).item() == 0


def test_functions_accept_an_empty_set_of_rois():
    none = torch.zeros(0)
    assert predicted_iou(torch.zeros(0, 2)).shape == (0,)
    assert rescore(none, none).shape == (0,)
    assert instance_score_loss(torch.zeros(0, 2), none, none.bool()).total.item() == 0


def test_ism_predicts_two_numbers_per_roi_from_the_features_of_a_grid_stage():
    ism = InstanceScoring(36 * 49)
    assert ism(torch.randn(3, 36, 7, 7)).shape == (3, 2)
    assert ism(torch.randn(0, 36, 7, 7)).shape == (0, 2)
