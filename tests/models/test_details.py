"""Detections with the values from which their scores were computed."""

import pytest
import torch
from inputs import random_image

from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.structures import DETAILS, Detections

SMALL = {"fpn_channels": 16, "mlp_channels": 16, "proposals_test": 40, "score_threshold": 0.05}
CPM = {"head": "cpm", "point_channels": 4, "grid_convs": 1}
CASES = {
    "cpm": CPM,
    "cpm without ISM": {**CPM, "ism": False},
    "cpm without RSM": {**CPM, "rsm": False},
    "cpm with a skipped ISM": {**CPM, "test_stages": 1},
    "cpm with a second NMS": {**CPM, "final_nms_iou": 0.5},
    "faster": {"head": "faster"},
    "faster with ISM and RSM": {"head": "faster", "ism": True, "rsm": True},
    "cascade": {"head": "cascade"},
    "cascade with ISM": {"head": "cascade", "ism": True},
    "cascade with RSM": {"head": "cascade", "rsm": True},
}
WITHOUT_ISM = {"cpm without ISM", "cpm with a skipped ISM", "faster", "cascade", "cascade with RSM"}
WITHOUT_RSM = {"cpm without RSM", "faster", "cascade", "cascade with ISM"}
IMAGES = [random_image(64, 80), random_image(64, 64, seed=1)]


def noisy_detector(**options):
    """A detector whose large random weights give scores of all sizes."""
    torch.manual_seed(0)
    detector = build_detector("tiny", 2, **SMALL, **options).eval()
    for name, parameter in detector.named_parameters():
        if "predictor.weight" in name or "cls_logits.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    if detector.head.ism is not None:
        torch.nn.init.normal_(detector.head.ism.predictor.weight, std=0.01)
        detector.head.ism.predictor.bias.data.fill_(0.5)
    return detector


@pytest.mark.parametrize("case", CASES)
def test_the_score_is_the_product_of_its_details(case):
    detector = noisy_detector(**CASES[case])
    with torch.no_grad():
        found = detector(IMAGES, details=True)
    expected = {"class_scores", *(["predicted_iou"] if case not in WITHOUT_ISM else [])}
    expected |= {"rsm_probability"} if case not in WITHOUT_RSM else set()
    for one in found:
        assert set(one) - {"boxes", "scores", "labels"} == expected
        assert len(one["scores"]) > 3
        scores = one["class_scores"]
        assert (scores > 0.05).all()
        if "predicted_iou" in one:
            scores = scores * one["predicted_iou"]
        if "rsm_probability" in one:
            scores = scores**0.8 * one["rsm_probability"] ** 0.2
        torch.testing.assert_close(one["scores"], scores)
        assert all(one[name].dtype == torch.float32 for name in expected)
        assert all(0 < one[name].mean() < 1 for name in expected)


@pytest.mark.parametrize("case", CASES)
def test_without_the_request_there_are_no_details_and_the_same_detections(case):
    detector = noisy_detector(**CASES[case])
    with torch.no_grad():
        plain, detailed = detector(IMAGES), detector(IMAGES, details=True)
    for one, other in zip(plain, detailed, strict=True):
        assert list(one) == ["boxes", "scores", "labels"]
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_no_detections_have_empty_details():
    detector = noisy_detector(**CPM)
    detector.head.settings = type(detector.head.settings)(**{**vars(detector.head.settings), "score_threshold": 1.0})
    with torch.no_grad():
        (found,) = detector(IMAGES[:1], details=True)
    assert all(found[name].shape == (0,) for name in DETAILS)


def test_rows_of_detections_keep_the_columns_that_they_have():
    columns = torch.zeros(3, 4), torch.zeros(3).long(), torch.rand(3), torch.ones(3).long(), torch.ones(3).bool()
    detections = Detections(*columns, predicted_iou=torch.tensor([0.1, 0.2, 0.3]))
    kept = detections[torch.tensor([2, 0])]
    assert kept.predicted_iou.tolist() == pytest.approx([0.3, 0.1])
    assert kept.class_scores is None
    assert kept.cat(kept).predicted_iou.shape == (4,)
    assert detections.without_details().predicted_iou is None
