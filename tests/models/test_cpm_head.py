from dataclasses import replace

import pytest
import torch
from inputs import (
    OBJECTS,
    head_inputs,
    make_ground_truth,
    make_target,
    no_rois,
    proposals_of_two_images,
    random_pyramid,
    two_images,
)

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.models.heads import cpm as cpm_module
from cpm_rcnn.models.heads import scoring as scoring_module
from cpm_rcnn.models.heads.classification import select_detections
from cpm_rcnn.models.heads.cpm import CMM_STAGES, CPMHead, CPMSettings
from cpm_rcnn.models.heads.grid_stage import GridStage
from cpm_rcnn.models.structures import GroundTruth, Rois, match_rois

SETTINGS = CPMSettings(mlp_channels=16, point_channels=4, grid_convs=1, samples=64)


def make_head(stages=CMM_STAGES, **changes):
    torch.manual_seed(0)
    return CPMHead(replace(SETTINGS, stages=stages, **changes), head_inputs())


@pytest.fixture(scope="module")
def features():
    return random_pyramid()


@pytest.fixture(scope="module")
def ground_truth():
    return two_images()


@pytest.fixture(scope="module")
def proposals():
    return proposals_of_two_images()


@pytest.fixture
def trained(monkeypatch):
    """The RoIs, match and output that each grid stage was trained with, in the order of the calls."""
    calls, losses = [], GridStage.losses

    def record(stage, output, rois, match):
        calls.append((rois, match, output))
        return losses(stage, output, rois, match)

    monkeypatch.setattr(GridStage, "losses", record)
    return calls


def test_each_part_of_the_head_has_its_loss(features, proposals, ground_truth):
    everything = ["loss_cls", "loss_grid0", "loss_grid1", "loss_grid2", "loss_ism", "loss_rsm"]
    assert list(make_head().losses(features, proposals, ground_truth)) == everything
    baseline = make_head(CMM_STAGES[:1], ism=False, rsm=False)
    assert list(baseline.losses(features, proposals, ground_truth)) == ["loss_cls", "loss_grid0"]
    assert (baseline.ism, baseline.rsm) == (None, None)


def test_initialization_and_ism_weights_reach_the_parts_of_the_head():
    for init, ism_weights in (("grid_rcnn", "equal"), ("pytorch", "release")):
        head = make_head(grid_init=init, ism_weights=ism_weights)
        assert [bool(stage.deconvs[0].bias.any()) for stage in head.stages] == [init == "pytorch"] * 3
        assert head.ism.weights == ism_weights


def test_stages_train_on_rois_that_overlap_their_match_by_at_least_their_threshold(
    features, proposals, ground_truth, trained
):
    make_head().losses(features, proposals, ground_truth)
    assert len(trained) == 3
    for (rois, match, _), settings in zip(trained, CMM_STAGES):
        assert len(rois) > 0
        assert rois.valid.all()
        expected = match_rois(rois, ground_truth, CONTINUOUS)
        assert torch.equal(match.boxes, expected.boxes)
        assert (expected.iou >= settings.positive_iou).all()


@pytest.mark.parametrize(("threshold", "count"), [(0.5, 4), (0.59, 4), (0.61, 3), (0.7, 3)])
def test_decoded_boxes_below_the_threshold_of_the_next_stage_are_dropped(
    features, ground_truth, trained, monkeypatch, threshold, count
):
    # The proposal is decoded to a box of IoU 0.6; the three ground-truth boxes always train the stage too.
    shifted = OBJECTS[1] + torch.tensor([15.0, 0, 15, 0])
    monkeypatch.setattr(GridStage, "decode", lambda _, output, rois: rois.with_boxes(shifted.expand(len(rois), 4)))
    stages = (CMM_STAGES[0], replace(CMM_STAGES[1], positive_iou=threshold))
    near = Rois.of(OBJECTS[1] + 1, torch.tensor([1]))
    make_head(stages, ism=False, rsm=False).losses(features, near, ground_truth)
    assert [len(rois) for rois, _, _ in trained] == [4, count]


def test_first_stage_gets_the_positives_of_the_classifier_up_to_its_limit_per_image(
    features, proposals, ground_truth, trained
):
    make_head(CMM_STAGES[:1], samples=80).losses(features, proposals, ground_truth)
    rois, _, _ = trained[-1]
    (candidates,) = proposals.cat(ground_truth.rois()).compact()
    positives = match_rois(candidates, ground_truth, CONTINUOUS).iou >= 0.5
    sampled = candidates.images[positives].bincount().clamp(max=20)  # a quarter of 80
    assert rois.images.bincount().tolist() == sampled.tolist()
    assert sampled.min() > 5
    make_head(CMM_STAGES[:1], samples=80, max_grid_rois=5).losses(features, proposals, ground_truth)
    assert trained[-1][0].images.bincount().tolist() == [5, 5]


def test_rois_within_the_limit_of_the_first_stage_are_chosen_at_random(features, proposals, ground_truth, trained):
    head = make_head(CMM_STAGES[:1], max_grid_rois=1, samples=80)
    for _ in range(12):
        head.losses(features, proposals, ground_truth)
    assert len({tuple(rois.boxes[0].tolist()) for rois, _, _ in trained}) > 3


def test_ground_truth_boxes_train_every_stage(features, ground_truth, trained):
    far = Rois.of(torch.tensor([[0.0, 0, 5, 5], [0, 0, 5, 5]]), torch.tensor([0, 1]))
    make_head(samples=200).losses(features, far, ground_truth)
    for rois, _, _ in trained:
        assert sorted(rois.boxes.tolist()) == sorted(torch.cat(OBJECTS).tolist())


def test_every_stage_is_limited_in_crowded_images(features, trained):
    corner = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 90
    crowd = torch.cat([corner, corner + 20], dim=1).tolist()
    objects = GroundTruth.stack([make_target(*boxes, labels=[1] * len(boxes)) for boxes in (crowd, crowd[:4])])
    make_head(max_grid_rois=8, samples=512).losses(features, no_rois(), objects)
    assert [rois.images.bincount().tolist() for rois, _, _ in trained] == [[8, 4]] * 3


def test_invalid_proposals_have_no_effect_on_losses_and_detections(features, proposals, ground_truth):
    invalid = proposals.with_boxes(proposals.boxes + 3).where(torch.zeros(len(proposals), dtype=torch.bool))
    head = make_head()
    losses, detections = [], []
    for rois in (proposals, invalid.cat(proposals)):
        torch.manual_seed(0)
        losses.append(
            {name: term.total.item() for name, term in head.train().losses(features, rois, ground_truth).items()}
        )
        with torch.no_grad():
            detections.append(head.eval().detect(features, rois))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(detections[0]) > 5
    torch.testing.assert_close(detections[1].boxes, detections[0].boxes)
    torch.testing.assert_close(detections[1].scores, detections[0].scores)
    assert torch.equal(detections[1].labels, detections[0].labels)


def test_ism_learns_the_iou_of_the_rois_that_entered_the_last_stage(
    features, proposals, ground_truth, trained, monkeypatch
):
    calls = []
    loss = scoring_module.instance_score_loss
    monkeypatch.setattr(
        scoring_module,
        "instance_score_loss",
        lambda predictions, iou, *rest: calls.append((predictions, iou)) or loss(predictions, iou, *rest),
    )
    head = make_head()
    head.losses(features, proposals, ground_truth)
    rois, match, output = trained[-1]
    [(predictions, iou)] = calls
    torch.testing.assert_close(iou, CONTINUOUS.iou(rois.boxes, match.boxes))
    torch.testing.assert_close(predictions, head.ism(output.features))


def test_rsm_learns_from_the_negatives_and_the_rois_of_the_last_stage(
    features, proposals, ground_truth, trained, monkeypatch
):
    calls, sample = [], cpm_module.sample_rois

    def record(rois, *arguments):
        calls.append((rois, sample(rois, *arguments)))
        return calls[-1][1]

    monkeypatch.setattr(cpm_module, "sample_rois", record)
    monkeypatch.setattr(scoring_module, "sample_rois", record)
    losses = make_head().losses(features, proposals, ground_truth)
    (_, first), (candidates, second) = calls
    assert torch.equal(candidates.boxes, first.negatives().cat(trained[-1][0]).boxes)
    match = match_rois(second.rois, ground_truth, CONTINUOUS)
    assert torch.equal(second.labels, torch.where(match.iou >= 0.5, match.labels, 0))
    assert (second.labels > 0).any()
    assert (second.labels == 0).any()
    assert losses["loss_rsm"].count == len(second.labels)


def test_decoded_boxes_carry_no_gradient_to_the_stage_before(features, proposals, ground_truth, trained):
    head = make_head(ism=False)
    losses = head.losses(features, proposals, ground_truth)
    assert not any(rois.boxes.requires_grad or match.boxes.requires_grad for rois, match, _ in trained)
    for name in ("loss_grid1", "loss_grid2", "loss_rsm"):
        head.zero_grad()
        losses[name].total.backward(retain_graph=True)
        assert all(p.grad is None or not p.grad.any() for p in head.stages[0].parameters())
        assert all(p.grad is None or not p.grad.any() for p in head.classifier.parameters())


@pytest.mark.parametrize("stages", [CMM_STAGES, CMM_STAGES[:1]], ids=["three", "one"])
def test_batch_without_objects_has_zero_grid_losses_and_all_gradients(features, proposals, stages):
    nothing = make_ground_truth([], [])
    head = make_head(stages)
    losses = head.losses(features, proposals, nothing)
    assert all(losses[f"loss_grid{k}"].total.item() == 0 for k in range(len(stages)))
    assert losses["loss_ism"].total.item() == 0
    assert losses["loss_cls"].count == losses["loss_rsm"].count == 80
    sum(term.total for term in losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_without_proposals_training_uses_the_ground_truth_and_nothing_is_detected(features, ground_truth):
    head = make_head()
    losses = head.losses(features, no_rois(), ground_truth)
    assert losses["loss_cls"].count == 3
    detections = head.eval().detect(features, no_rois())
    assert (detections.boxes.shape, detections.scores.shape, detections.labels.shape) == ((0, 4), (0,), (0,))


@pytest.mark.parametrize("test_stages", [None, 1])
def test_detection_classifies_refines_and_rescores(features, proposals, test_stages):
    head = make_head(CMM_STAGES[:2], test_stages=test_stages).eval()
    with torch.no_grad():
        found = head.detect(features, proposals)
        probabilities = torch.softmax(head.classifier(features, proposals), dim=1)
        rois, scores, labels, _ = select_detections(probabilities, proposals, score_threshold=0.03, nms_iou=0.3)
        for stage in head.stages[:test_stages]:
            output = stage(features, rois)
            rois = stage.decode(output, rois)
        if test_stages is None:  # ISM reads the features of the last stage
            scores = scores * head.ism(output.features)[:, 1].clamp(0, 1)
        again = torch.softmax(head.rsm(features, rois), dim=1)[torch.arange(len(labels)), labels]
        scores = scores**0.8 * again**0.2
    assert len(labels) > 5
    torch.testing.assert_close(found.boxes, rois.boxes)
    assert torch.equal(found.images, rois.images)
    torch.testing.assert_close(found.scores, scores)
    assert torch.equal(found.labels, labels)


def test_final_nms_drops_refined_boxes_that_overlap_a_better_one_of_their_class(features, proposals, monkeypatch):
    # Every box is refined to the same object of its image.
    monkeypatch.setattr(
        GridStage,
        "decode",
        lambda _, output, rois: rois.with_boxes(torch.stack([OBJECTS[0][0], OBJECTS[1][0]])[rois.images]),
    )
    head = make_head(CMM_STAGES[:2]).eval()
    with torch.no_grad():
        published = head.detect(features, proposals)
        head.settings = replace(head.settings, final_nms_iou=0.5)
        found = head.detect(features, proposals)
    pairs = {(image, label) for image, label in zip(published.images.tolist(), published.labels.tolist())}
    assert len(published) > len(pairs) == len(found) > 2
    for image, label, score in zip(found.images, found.labels, found.scores):
        same = (published.images == image) & (published.labels == label)
        assert score == published.scores[same].max()
