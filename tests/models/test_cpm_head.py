import pytest
import torch

from cpm_rcnn.models import cpm_head as cpm_head_module
from cpm_rcnn.models.build import CMM_STAGES
from cpm_rcnn.models.heads.cpm import CPMHead
from cpm_rcnn.models.heads.grid_stage import GridStage, StageSettings
from cpm_rcnn.models.structures import Match, Rois, GroundTruth, match_rois
from cpm_rcnn.boxes import CONTINUOUS

STRIDES = (4, 8, 16, 32)


def make_head(stages=CMM_STAGES, **arguments):
    torch.manual_seed(0)
    defaults = {
        "ism": True,
        "rsm": True,
        "fusion": False,
        "mlp_channels": 16,
        "point_channels": 4,
        "grid_convs": 1,
        "samples": 64,
        "max_grid_rois": 96,
        "score_threshold": 0.03,
        "nms_iou": 0.3,
        "test_stages": None,
        "convention": CONTINUOUS,
    }
    return CPMHead(8, STRIDES, 3, stages=[StageSettings(**stage) for stage in stages], **defaults | arguments)


def pyramid(batch=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 8, 128 // stride, 128 // stride, generator=generator) for stride in STRIDES]


BOXES = torch.tensor([[10.0, 10, 50, 60], [60, 50, 110, 100]]), torch.tensor([[30.0, 30, 90, 90]])


@pytest.fixture
def truth():
    return GroundTruth.stack(
        [{"boxes": BOXES[0], "labels": torch.tensor([1, 2])}, {"boxes": BOXES[1], "labels": torch.tensor([3])}]
    )


@pytest.fixture
def proposals():
    """20 boxes an image near its objects, 20 anywhere."""
    generator = torch.Generator().manual_seed(2)
    boxes = []
    for objects in BOXES:
        near = objects.repeat(20, 1)[:20] + 6 * torch.randn(20, 4, generator=generator)
        corner = 80 * torch.rand(20, 2, generator=generator)
        boxes += [near, torch.cat([corner, corner + 10 + 30 * torch.rand(20, 2, generator=generator)], dim=1)]
    return Rois(torch.cat(boxes), torch.arange(2).repeat_interleave(40))


@pytest.fixture
def seen(monkeypatch):
    """What each grid stage was trained on: its RoIs and the objects of them, in order of the stages."""
    calls, loss = [], GridStage.loss

    def record(stage, output, rois, boxes):
        calls.append((rois, boxes, output))
        return loss(stage, output, rois, boxes)

    monkeypatch.setattr(GridStage, "loss", record)
    return calls


def test_losses_have_a_name_a_part(proposals, truth):
    everything = ["loss_cls", "loss_grid0", "loss_grid1", "loss_grid2", "loss_ism", "loss_rsm"]
    assert list(make_head().losses(pyramid(), proposals, truth)) == everything
    baseline = make_head(CMM_STAGES[:1], ism=False, rsm=False)
    assert list(baseline.losses(pyramid(), proposals, truth)) == ["loss_cls", "loss_grid0"]
    assert (baseline.ism, baseline.rsm) == (None, None)


def test_every_stage_trains_on_rois_that_overlap_their_best_object_by_its_threshold(proposals, truth, seen):
    make_head().losses(pyramid(), proposals, truth)
    assert len(seen) == 3
    for (rois, boxes, _), settings in zip(seen, CMM_STAGES):
        assert len(rois.boxes) > 0
        match = match_rois(rois, truth, CONTINUOUS)
        assert torch.equal(match.boxes, boxes)
        assert (match.iou >= settings["positive_iou"]).all()


def test_stage_0_takes_the_classifiers_positives_up_to_its_limit_an_image(proposals, truth, seen):
    head = make_head(CMM_STAGES[:1], samples=80)
    head.losses(pyramid(), proposals, truth)
    rois, _, _ = seen[-1]
    candidates = proposals.join(truth.rois())
    positives = match_rois(candidates, truth, CONTINUOUS).iou >= 0.5
    sampled = candidates.images[positives].bincount().clamp(max=20)  # a quarter of 80
    assert rois.images.bincount().tolist() == sampled.tolist()
    assert sampled.min() > 5
    head.max_grid_rois = 5
    head.losses(pyramid(), proposals, truth)
    assert seen[-1][0].images.bincount().tolist() == [5, 5]


def test_limit_of_stage_0_keeps_a_random_choice(proposals, truth, seen):
    head = make_head(CMM_STAGES[:1], max_grid_rois=1, samples=80)
    for _ in range(12):
        head.losses(pyramid(), proposals, truth)
    assert len({tuple(rois.boxes[0].tolist()) for rois, _, _ in seen}) > 3


def test_ground_truth_boxes_are_among_the_rois(truth, seen):
    far = Rois(torch.tensor([[0.0, 0, 5, 5], [0, 0, 5, 5]]), torch.tensor([0, 1]))
    make_head(samples=200).losses(pyramid(), far, truth)
    for rois, _, _ in seen:
        assert sorted(rois.boxes.tolist()) == sorted(torch.cat(BOXES).tolist())


def test_between_stages_true_boxes_are_dropped_and_appended_again_and_the_rest_decoded(truth):
    rois = Rois(torch.stack([BOXES[0][0], BOXES[0][0] + 2, BOXES[1][0], BOXES[1][0] + 3]), torch.tensor([0, 0, 1, 1]))
    decoded = Rois(rois.boxes + 1, rois.images)
    following, match = make_head()._next_rois(rois, decoded, match_rois(rois, truth, CONTINUOUS), truth, 0.5)
    assert following.boxes.tolist() == torch.cat([decoded.boxes[(1, 3), :], *BOXES]).tolist()
    assert following.images.tolist() == [0, 1, 0, 0, 1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            (match.iou, match.boxes, match.labels),
            (lambda m: (m.iou, m.boxes, m.labels))(match_rois(following, truth, CONTINUOUS)),
        )
    )


def test_between_stages_boxes_below_the_next_threshold_go(truth):
    start = Rois(BOXES[1] + 1, torch.tensor([1]))
    shifted = Rois(BOXES[1] + torch.tensor([15.0, 0, 15, 0]), torch.tensor([1]))  # IoU 0.6
    match = match_rois(start, truth, CONTINUOUS)
    counts = [len(make_head()._next_rois(start, shifted, match, truth, t)[0].boxes) for t in (0.5, 0.59, 0.61, 0.7)]
    assert counts == [4, 4, 3, 3]


def test_decoded_box_is_matched_again_and_may_change_its_object(truth):
    start = Rois(BOXES[0][:1] + 1, torch.tensor([0]))
    decoded = Rois(BOXES[0][1:] + 1, torch.tensor([0]))
    _, match = make_head()._next_rois(start, decoded, match_rois(start, truth, CONTINUOUS), truth, 0.5)
    assert match.labels.tolist() == [2, 1, 2, 3]


def test_instance_scores_learn_the_iou_of_what_entered_the_last_stage(proposals, truth, seen, monkeypatch):
    learned = []
    loss = cpm_head_module.instance_score_loss
    monkeypatch.setattr(
        cpm_head_module,
        "instance_score_loss",
        lambda predictions, iou: learned.append((predictions, iou)) or loss(predictions, iou),
    )
    head = make_head()
    head.losses(pyramid(), proposals, truth)
    rois, boxes, output = seen[-1]
    [(predictions, iou)] = learned
    torch.testing.assert_close(iou, CONTINUOUS.iou(rois.boxes, boxes))
    torch.testing.assert_close(predictions, head.ism(output.point_features))


def test_rescoring_learns_the_negatives_and_the_last_stages_rois_matched_again(proposals, truth, seen, monkeypatch):
    samples, sample = [], CPMHead._sample

    def record(head, rois, truth):
        samples.append((rois, sample(head, rois, truth)))
        return samples[-1][1]

    monkeypatch.setattr(CPMHead, "_sample", record)
    losses = make_head().losses(pyramid(), proposals, truth)
    (_, first), (candidates, second) = samples
    negatives = first.rois.keep(first.negative)
    assert torch.equal(candidates.boxes, negatives.join(seen[-1][0]).boxes)
    match = match_rois(second.rois, truth, CONTINUOUS)
    assert torch.equal(second.labels, torch.where(match.iou >= 0.5, match.labels, 0))
    assert (second.labels > 0).any()
    assert (second.labels == 0).any()
    assert losses["loss_rsm"].count == len(second.labels)


def test_sampled_labels_are_those_of_the_matched_objects_and_background_below_half(proposals, truth):
    sampled = make_head()._sample(proposals, truth)
    match = match_rois(sampled.rois, truth, CONTINUOUS)
    assert torch.equal(sampled.labels, torch.where(match.iou >= 0.5, match.labels, 0))
    assert torch.equal(sampled.negative, match.iou < 0.5)
    assert not (sampled.for_grid & sampled.negative).any()
    assert sampled.rois.images.bincount().max() <= 64


def test_no_gradient_reaches_a_stage_through_the_boxes_it_gave_the_next(proposals, truth, seen):
    head = make_head(ism=False)
    losses = head.losses(pyramid(), proposals, truth)
    assert not any(rois.boxes.requires_grad or boxes.requires_grad for rois, boxes, _ in seen)
    for name in ("loss_grid1", "loss_grid2", "loss_rsm"):
        head.zero_grad()
        losses[name].total.backward(retain_graph=True)
        assert all(p.grad is None or not p.grad.any() for p in head.stages[0].parameters())
        assert all(p.grad is None or not p.grad.any() for p in head.classifier.parameters())


@pytest.mark.parametrize("stages", [CMM_STAGES, CMM_STAGES[:1]], ids=["three", "one"])
def test_batch_without_objects_has_zero_grid_losses_and_gradients_everywhere(proposals, stages):
    nothing = GroundTruth.stack([{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2)
    head = make_head(stages)
    losses = head.losses(pyramid(), proposals, nothing)
    assert all(losses[f"loss_grid{k}"].total.item() == 0 for k in range(len(stages)))
    assert losses["loss_ism"].total.item() == 0
    assert losses["loss_cls"].count == losses["loss_rsm"].count == 80
    sum(term.total for term in losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_no_proposals_still_train_on_the_ground_truth_and_detect_nothing(truth):
    head, none = make_head(), Rois(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    losses = head.losses(pyramid(), none, truth)
    assert losses["loss_cls"].count == 3
    detections = head.eval().detect(pyramid(), none)
    assert (detections.rois.boxes.shape, detections.scores.shape, detections.labels.shape) == ((0, 4), (0,), (0,))


def test_detection_is_classify_map_score_rescore(proposals):
    head = make_head(CMM_STAGES[:2]).eval()
    features = pyramid()
    with torch.no_grad():
        found = head.detect(features, proposals)
        probabilities = torch.softmax(head.classifier(features, proposals), dim=1)
        rois, scores, labels = cpm_head_module.select_detections(
            probabilities, proposals, score_threshold=0.03, nms_iou=0.3
        )
        for stage in head.stages:
            output = stage(features, rois)
            rois = stage.decode(output, rois)
        scores = scores * head.ism(output.point_features)[:, 1].clamp(0, 1)
        again = torch.softmax(head.rsm(features, rois), dim=1)[torch.arange(len(labels)), labels]
        scores = scores**0.8 * again**0.2
    assert len(labels) > 5
    torch.testing.assert_close(found.rois.boxes, rois.boxes)
    torch.testing.assert_close(found.scores, scores)
    assert torch.equal(found.labels, labels)


def test_match_type_is_kept_by_selection():
    match = Match(torch.rand(3), torch.rand(3, 4), torch.tensor([1, 2, 3])).keep(torch.tensor([True, False, True]))
    assert match.labels.tolist() == [1, 3]
