"""A new head is a class and its settings; registering it in HEADS is all that a detector needs."""

from dataclasses import dataclass

import pytest
import torch
from inputs import make_target, random_image

from cpm_rcnn import settings
from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.heads import HEADS, RoIHead
from cpm_rcnn.models.heads.classification import Classifier, classification_loss, select_detections
from cpm_rcnn.models.heads.roi_sampling import sample_rois
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.models.structures import Detections


@dataclass(frozen=True)
class ProposalHeadSettings(settings.Settings):
    width: int = settings.architecture(16, check=settings.integer())
    rois_per_image: int = settings.training(32, check=settings.integer())
    min_score: float = settings.inference(0.0, check=settings.number(0, 1))


class ProposalHead(RoIHead):
    """Classifies the proposals and keeps their boxes."""

    settings_class = ProposalHeadSettings

    def __init__(self, settings, inputs):
        super().__init__()
        self.settings, self.convention = settings, inputs.convention
        self.classifier = Classifier(inputs, settings.width)

    def detect(self, features, proposals):
        probabilities = torch.softmax(self.classifier(features, proposals), dim=1)
        threshold = self.settings.min_score
        rois, scores, labels, _ = select_detections(probabilities, proposals, score_threshold=threshold, nms_iou=0.5)
        return Detections(rois.boxes, rois.images, scores, labels, rois.valid)

    def losses(self, features, proposals, ground_truth):
        candidates = proposals.cat(ground_truth.rois())
        sampled = sample_rois(candidates, ground_truth, self.convention, self.settings.rois_per_image)
        logits = self.classifier(features, sampled.rois)
        return {"loss_proposals": classification_loss(logits, sampled.labels, sampled.rois.valid)}


@pytest.fixture
def build_small(monkeypatch):
    monkeypatch.setitem(HEADS, "proposals", ProposalHead)
    torch.manual_seed(0)
    return lambda **options: build_detector("tiny", 2, head="proposals", fpn_channels=16, **options)


def test_registered_head_is_built_with_its_options(build_small):
    detector = build_small(width=8, rois_per_image=4, proposals_test=10)
    assert isinstance(detector.head, ProposalHead)
    assert detector.head.settings == ProposalHeadSettings(width=8, rois_per_image=4)
    assert detector.rpn.settings.proposals_test == 10
    assert detector.head.classifier.predictor.in_features == 8


def test_registered_head_trains_and_detects(build_small):
    detector = build_small(ignore_border_anchors=False)
    images = [random_image(64, 64), random_image(48, 64, seed=1)]
    losses = detector(images, [make_target([4, 6, 34, 40]), make_target()])
    assert set(losses) == {"loss_rpn_objectness", "loss_rpn_box", "loss_proposals"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    with torch.no_grad():
        detections = detector.eval()(images)
    assert len(detections) == 2
    for found in detections:
        assert len(found["scores"]) > 0
        assert set(found["labels"].tolist()) <= {1, 2}


def test_settings_of_a_registered_head_are_stored_and_compared_like_others(build_small):
    model_settings = build_small(width=8, min_score=0.2).settings
    options = model_settings.to_options()
    assert (options["head"], options["width"], options["min_score"]) == ("proposals", 8, 0.2)
    assert ModelSettings.from_options(**options) == model_settings
    assert {"head", "width"} < model_settings.architecture().keys()
    assert not {"rois_per_image", "min_score"} & model_settings.architecture().keys()


def test_options_of_another_head_are_refused(build_small):
    with pytest.raises(ArgumentError, match=r"^ism: the head proposals has no such option; .*width, rois_per_image"):
        build_small(ism=True)
