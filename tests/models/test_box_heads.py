"""The Faster R-CNN and Cascade R-CNN heads."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from inputs import (
    OBJECTS,
    head_inputs,
    make_ground_truth,
    proposals_of_two_images,
    random_pyramid,
    two_images,
)

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.models.heads.box_stage import BoxStage, BoxStageSettings
from cpm_rcnn.models.heads.cascade import CASCADE_STAGES, CascadeHead, CascadeSettings
from cpm_rcnn.models.heads.classification import select_detections
from cpm_rcnn.models.heads.faster import FasterHead, FasterSettings
from cpm_rcnn.models.structures import Rois, match_rois

SIZES = torch.tensor([[128, 128], [110, 100]])
SMALL = {"mlp_channels": 16, "samples": 64}
CLASSES = 3


def make_head(kind="cascade", **changes):
    torch.manual_seed(0)
    if kind == "faster":
        return FasterHead(FasterSettings(**{**SMALL, **changes}), head_inputs(num_classes=CLASSES))
    return CascadeHead(CascadeSettings(**{**SMALL, **changes}), head_inputs(num_classes=CLASSES))


def perturbed(head):
    """The head with weights large enough to move boxes and to make scores differ."""
    for stage in head.stages:
        torch.nn.init.normal_(stage.regressor.weight, std=0.3)
        torch.nn.init.normal_(stage.classifier.predictor.weight, std=0.5)
    return head


@pytest.fixture(scope="module")
def features():
    return random_pyramid()


@pytest.fixture(scope="module")
def ground_truth():
    return two_images()


@pytest.fixture(scope="module")
def proposals():
    return proposals_of_two_images(SIZES, reach=60)


def no_proposals():
    return Rois.of(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), SIZES)


@pytest.fixture
def trained(monkeypatch):
    """The RoIs and match that each stage was trained with, in the order of the calls."""
    calls, losses = [], BoxStage.losses

    def record(stage, output, rois, match):
        calls.append((rois, match))
        return losses(stage, output, rois, match)

    monkeypatch.setattr(BoxStage, "losses", record)
    return calls


# --- one stage ---


def test_deltas_are_divided_by_the_coder_weights_and_boxes_are_clipped_to_their_image():
    stage = BoxStage(BoxStageSettings(coder_weights=(10, 10, 5, 5)), head_inputs(), mlp_channels=4, class_agnostic=True)
    rois = Rois.of(torch.tensor([[10.0, 20, 30, 60], [60, 60, 100, 100]]), torch.tensor([0, 1]), SIZES)
    output = stage(random_pyramid(), rois)
    deltas = torch.tensor([[1.0, -2, 5 * torch.tensor(1.5).log(), 0], [10, 0, 0, 0]])[:, None]
    boxes = stage.boxes(output._replace(deltas=deltas), rois)
    # A tenth of 20 pixels to the right, two tenths of 40 up, 1.5 times as wide; the second leaves its image.
    torch.testing.assert_close(boxes, torch.tensor([[[7.0, 12, 37, 52]], [[100, 60, 100, 100]]]))
    assert torch.equal(stage.decode(output._replace(deltas=deltas), rois).boxes, boxes[:, 0])


def test_losses_of_a_stage_are_those_of_fast_rcnn():
    for class_agnostic in (True, False):
        torch.manual_seed(0)
        stage = BoxStage(
            BoxStageSettings(0.6, (20, 20, 10, 10), 0.5), head_inputs(), mlp_channels=8, class_agnostic=class_agnostic
        )
        torch.nn.init.normal_(stage.regressor.weight)
        truth = make_ground_truth(OBJECTS[0].tolist(), [])
        boxes = torch.tensor([[12.0, 11, 50, 60], [60, 45, 108, 100], [10, 10, 50, 95], [5, 5, 20, 20], [9, 9, 51, 61]])
        rois = Rois(boxes, torch.tensor([0, 0, 0, 1, 0]), torch.tensor([True] * 4 + [False]), SIZES)
        match = match_rois(rois, truth, CONTINUOUS)
        # The third overlaps by 0.59, the fourth is in an image without objects, the last is invalid.
        assert [iou >= 0.6 for iou in match.iou.tolist()] == [True, True, False, False, True]
        output = stage(random_pyramid(), rois)
        losses = stage.losses(output, rois, match)
        labels = torch.tensor([1, 2, 0, 0])
        expected = 0.5 * F.cross_entropy(output.logits[:4], labels, reduction="sum")
        torch.testing.assert_close(losses["cls"].total, expected)
        total = 0
        for row, label in ((0, 1), (1, 2)):
            target = CONTINUOUS.encode(match.boxes[row], boxes[row]) * torch.tensor([20.0, 20, 10, 10])
            deltas = output.deltas[row, 0 if class_agnostic else label - 1]
            total += 0.5 * F.smooth_l1_loss(deltas, target, beta=1 / 9, reduction="sum")
        torch.testing.assert_close(losses["box"].total, total)
        assert losses["cls"].count == losses["box"].count == 4
        sum(term.total for term in losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in stage.parameters())


# --- training ---


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_each_part_of_the_head_has_its_loss(kind, features, proposals, ground_truth):
    stages = 1 if kind == "faster" else 3
    expected = [f"loss_{name}{k}" for k in range(stages) for name in ("cls", "box")]
    assert list(make_head(kind).losses(features, proposals, ground_truth)) == expected
    head = make_head(kind, ism=True, rsm=True)
    losses = head.losses(features, proposals, ground_truth)
    assert list(losses) == [*expected, "loss_ism", "loss_rsm"]
    sum(term.total for term in losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_each_stage_trains_on_a_new_sample_of_refined_boxes_and_objects(features, proposals, ground_truth, trained):
    head = perturbed(make_head(samples=16))
    head.losses(features, proposals, ground_truth)
    assert len(trained) == 3
    for k, (rois, match) in enumerate(trained):
        threshold = CASCADE_STAGES[k].positive_iou
        expected = match_rois(rois, ground_truth, CONTINUOUS)
        torch.testing.assert_close(match.iou, expected.iou)
        for image in (0, 1):
            positive = match.iou[rois.images == image] >= threshold
            assert 0 < positive.sum() <= 4
            assert len(positive) <= 16
    inputs = {tuple(box) for box in proposals.boxes.tolist()}
    inputs |= {tuple(box) for objects in OBJECTS for box in objects.tolist()}
    later = [tuple(box) for rois, _ in trained[1:] for box in rois.boxes.tolist()]
    assert {tuple(box) for box in trained[0][0].boxes.tolist()} <= inputs
    assert sum(box not in inputs for box in later) > 10, "later stages get decoded boxes"


def test_a_stage_s_boxes_are_clipped_to_the_image_before_the_next_stage(features, proposals, ground_truth, trained):
    perturbed(make_head()).losses(features, proposals, ground_truth)
    for rois, _ in trained[1:]:
        limit = SIZES[rois.images].flip(1).repeat(1, 2)
        assert (rois.boxes >= 0).all()
        assert (rois.boxes <= limit).all()


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_images_without_objects_train_only_the_classification(kind, features, proposals):
    head = make_head(kind, ism=True, rsm=True)
    losses = head.losses(features, proposals, make_ground_truth([], []))
    assert losses["loss_box0"].total == losses["loss_ism"].total == 0
    assert losses["loss_cls0"].total > 0
    assert losses["loss_rsm"].count == losses["loss_cls0"].count
    sum(term.total for term in losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_ism_is_trained_on_the_rois_of_the_last_stage_that_overlap_an_object(
    features, proposals, ground_truth, trained
):
    head = perturbed(make_head(ism=True))
    count = head.losses(features, proposals, ground_truth)["loss_ism"].count
    rois, match = trained[-1]
    assert count == (match.iou >= 0.5).sum()
    assert 0 < count < len(rois)


# --- detection ---


def test_faster_predicts_a_box_for_each_class(features, proposals):
    head = perturbed(make_head("faster")).eval()
    with torch.no_grad():
        found = head.detect(features, proposals)
        output = head.stages[0](features, proposals)
        probabilities = torch.softmax(output.logits, dim=1)
        boxes = head.stages[0].boxes(output, proposals)
    assert boxes.shape == (80, CLASSES, 4)
    assert len(found) > 20
    for box, image, score, label in zip(found.boxes, found.images, found.scores, found.labels):
        row = (probabilities[:, label] == score).nonzero().item()
        assert torch.equal(boxes[row, label - 1], box)
        assert proposals.images[row] == image


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_cascade_averages_scores_over_its_stages_and_takes_the_last_boxes(features, proposals, average):
    head = perturbed(make_head(score_average=average)).eval()
    with torch.no_grad():
        found = head.detect(features, proposals)
        rois, logits = proposals, []
        for stage in head.stages:
            output = stage(features, rois)
            rois = stage.decode(output, rois)
            logits.append(output.logits)
    if average == "logits":
        probabilities = torch.softmax(torch.stack(logits).mean(0), dim=1)
    else:
        probabilities = torch.stack([torch.softmax(x, dim=1) for x in logits]).mean(0)
    expected = select_detections(probabilities, rois, score_threshold=0.05, nms_iou=0.5)
    assert len(found) > 20
    assert torch.equal(found.boxes, expected.rois.boxes)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_ism_and_rsm_change_the_scores_and_not_the_boxes(kind, features, proposals):
    head = perturbed(make_head(kind, ism=True, rsm=True)).eval()
    torch.nn.init.normal_(head.ism.predictor.weight)
    torch.nn.init.constant_(head.ism.predictor.bias, 0.5)
    torch.nn.init.normal_(head.rsm.predictor.weight)
    with torch.no_grad():
        both = head.detect(features, proposals)
        ism, rsm = head.ism, head.rsm
        head.ism = head.rsm = None
        plain = head.detect(features, proposals)
        rois = proposals
        *earlier, last = head.stages
        for stage in earlier:
            rois = stage.decode(stage(features, rois), rois)
        predicted = ism(last(features, rois).features)[:, 1].clamp(0, 1)
        again = torch.softmax(rsm(features, Rois.of(plain.boxes, plain.images)), dim=1)
        again = again.gather(1, plain.labels[:, None]).squeeze(1)
    assert torch.equal(both.boxes, plain.boxes)
    # The RoI of a detection is the one whose score it has.
    head.settings = replace(head.settings, score_threshold=0.0, nms_iou=1.0, max_detections=10_000)
    with torch.no_grad():
        outputs, current = [], proposals
        for stage in head.stages:
            outputs.append(stage(features, current))
            current = stage.decode(outputs[-1], current) if stage is not last else current
    probabilities = head.probabilities(outputs)
    rows = [int((probabilities[:, n] == s).nonzero()) for s, n in zip(plain.scores, plain.labels)]
    expected = (plain.scores * predicted[rows]) ** 0.8 * again**0.2
    torch.testing.assert_close(both.scores, expected)
    assert both.scores.std() > 0.01


def test_at_most_max_detections_per_image_are_kept_and_they_are_the_best(features, proposals):
    head = perturbed(make_head("faster", score_threshold=0.0)).eval()
    with torch.no_grad():
        everything = head.detect(features, proposals)
        head.settings = replace(head.settings, max_detections=5)
        few = head.detect(features, proposals)
    for image in (0, 1):
        scores = everything.scores[everything.images == image]
        assert len(scores) > 5
        assert torch.equal(few.scores[few.images == image], scores.sort(descending=True).values[:5])


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_without_proposals_the_objects_train_the_head_and_nothing_is_detected(kind, features, ground_truth):
    head = make_head(kind, ism=True, rsm=True)
    assert head.losses(features, no_proposals(), ground_truth)["loss_cls0"].count == 3
    found = head.eval().detect(features, no_proposals())
    assert (found.boxes.shape, found.scores.shape, found.labels.shape) == ((0, 4), (0,), (0,))


def test_a_box_that_is_not_finite_names_its_stage(features, proposals):
    head = perturbed(make_head()).eval()
    torch.nn.init.constant_(head.stages[1].regressor.bias, float("nan"))
    with pytest.raises(UserError, match=r"head\.stages\.1"):
        head.detect(features, proposals)


# --- settings and classes ---


def test_parameters_that_depend_on_the_classes():
    names = [f"stages.{k}.classifier.predictor.{kind}" for k in range(3) for kind in ("weight", "bias")]
    head = make_head(ism=True, rsm=True)
    assert sorted(head.class_parameters()) == sorted([*names, "rsm.predictor.weight", "rsm.predictor.bias"])
    regressor = ["stages.0.regressor.weight", "stages.0.regressor.bias"]
    assert sorted(make_head("faster").class_parameters()) == sorted([*names[:2], *regressor])
    # All other parameters have the same shape for another number of classes.
    other = FasterHead(FasterSettings(**SMALL), head_inputs(num_classes=9)).state_dict()
    for name, value in make_head("faster").state_dict().items():
        assert (value.shape != other[name].shape) == (name in make_head("faster").class_parameters())


def test_faulty_stages_are_refused_by_name():
    with pytest.raises(ArgumentError, match=r"^stages=\[\]: at least one box stage"):
        CascadeSettings(stages=[])
    with pytest.raises(ArgumentError, match=r"^stages\[0\]\.coder_weights=.*4 values"):
        CascadeSettings(stages=[{"coder_weights": [10, 10, 5]}])
    with pytest.raises(ArgumentError, match=r"^score_average=sum: must be one of"):
        CascadeSettings(score_average="sum")
