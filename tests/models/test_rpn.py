import pytest
import torch
import torch.nn.functional as F
from inputs import LargestTensor, make_ground_truth, random_pyramid, random_rois
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as TorchvisionRPN
from torchvision.ops import box_iou, nms

from cpm_rcnn.boxes import CONTINUOUS, INCLUSIVE
from cpm_rcnn.models import rpn as rpn_module
from cpm_rcnn.models.rpn import RATIOS, RegionProposalNetwork, RPNSettings, level_anchors
from cpm_rcnn.models.structures import GroundTruth

CPU = torch.device("cpu")


def make_rpn(strides=(8, 16), *, convention=CONTINUOUS, border=False, train=200, test=100, **options):
    """An RPN on one or two levels with anchors of 32 and 64 pixels."""
    torch.manual_seed(0)
    settings = RPNSettings(
        anchor_sizes=(32, 64, 128, 256, 512),
        ignore_border_anchors=border,
        proposals_train=train,
        proposals_test=test,
        **options,
    )
    return RegionProposalNetwork(settings, 4, strides, convention)


def pyramid(batch=2, strides=(8, 16)):
    return random_pyramid(batch, channels=4, strides=strides)


def test_anchors_are_ordered_by_row_then_column_then_ratio(convention):
    anchors = level_anchors(convention, 8, 32, (2, 3), CPU)
    cell = convention.cell_anchors(8, 32, RATIOS)
    expected = [cell[k] + torch.tensor([8 * x, 8 * y] * 2) for y in range(2) for x in range(3) for k in range(3)]
    assert torch.equal(anchors, torch.stack(expected))


@pytest.mark.parametrize(
    ("level", "image", "row", "column", "ratio"), [(0, 0, 3, 5, 0), (0, 1, 9, 2, 2), (1, 1, 4, 6, 1)]
)
def test_outputs_of_the_head_are_applied_to_the_anchor_at_their_position(convention, level, image, row, column, ratio):
    rpn = make_rpn(convention=convention, test=3).eval()
    features = pyramid()
    logits = [torch.full((2, 3, *x.shape[-2:]), -9.0) for x in features]
    deltas = [torch.zeros(2, 12, *x.shape[-2:]) for x in features]
    logits[level][image, ratio, row, column] = 9.0
    moves = torch.tensor([0.1, -0.2, 0.15, -0.3])
    deltas[level][image, 4 * ratio : 4 * ratio + 4, row, column] = moves
    rpn.head.forward = lambda _: (logits, deltas)
    proposals, losses = rpn(features, torch.tensor([[400, 400], [400, 400]]))
    stride = rpn.strides[level]
    anchor = convention.cell_anchors(stride, rpn.settings.anchor_sizes[level], RATIOS)[ratio]
    anchor = anchor + torch.tensor([column * stride, row * stride] * 2)
    best = proposals.boxes[proposals.images == image][0]
    torch.testing.assert_close(best, convention.decode(moves, anchor))
    assert losses == {}


def test_proposals_are_clipped_limited_and_sorted_by_score(convention):
    rpn = make_rpn(convention=convention, test=20).eval()
    nn.init.normal_(rpn.head.bbox_pred.weight, std=0.5)
    nn.init.normal_(rpn.head.cls_logits.weight, std=1.0)
    sizes = torch.tensor([[100, 128], [128, 60]])
    features = pyramid()
    proposals, _ = rpn(features, sizes)
    assert proposals.boxes.dtype == torch.float32
    assert not proposals.boxes.requires_grad
    for image, (height, width) in enumerate(sizes.tolist()):
        boxes = proposals.boxes[proposals.images == image]
        assert len(boxes) == 20
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= width - convention.extra).all()
        assert (boxes[:, 3] <= height - convention.extra).all()
        assert all((side > 0).all() for side in convention.sizes(boxes))
        expected = slow_proposals(rpn, [x[image : image + 1] for x in features], sizes[image], 20)
        torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-3)


@torch.no_grad()
def slow_proposals(rpn, features, size, limit):
    """Proposals of one image: NMS for each level, then the best of all levels, best first."""
    boxes, scores = [], []
    logits, deltas = rpn.head(features)
    for stride, anchor_size, level_logits, level_deltas in zip(rpn.strides, rpn.settings.anchor_sizes, logits, deltas):
        anchors = level_anchors(rpn.convention, stride, anchor_size, level_logits.shape[-2:], CPU)
        score = level_logits[0].permute(1, 2, 0).flatten()
        delta = level_deltas[0].permute(1, 2, 0).reshape(-1, 4)
        best = score.argsort(descending=True)[:limit]
        box = rpn.convention.clip(rpn.convention.decode(delta[best], anchors[best]), size)
        some = torch.stack(rpn.convention.sizes(box)).amin(dim=0) > 0
        box, score = box[some], score[best][some]
        kept = nms(box, score, 0.7)
        boxes.append(box[kept])
        scores.append(score[kept])
    return torch.cat(boxes)[torch.cat(scores).argsort(descending=True)[:limit]]


def test_number_of_proposals_is_limited_separately_in_training_and_at_test():
    rpn = make_rpn(train=30, test=7)
    sizes = torch.tensor([[128, 128]] * 2)
    counts = {mode: rpn.train(mode)(pyramid(), sizes)[0].images.bincount().tolist() for mode in (True, False)}
    assert counts == {True: [30, 30], False: [7, 7]}


def test_proposals_per_batch_are_the_best_of_all_its_images_in_training_only():
    rpn = make_rpn(train=200, test=200, proposals_train_per="batch")
    features, sizes = pyramid(), torch.tensor([[128, 128]] * 2)
    logits, deltas = rpn.head(features)
    # Every score of image 1 is higher than every score of image 0.
    logits = [x.detach().contiguous() + torch.tensor([0.0, 100.0]).view(2, 1, 1, 1) for x in logits]
    rpn.head.forward = lambda _: (logits, deltas)
    each, _ = rpn.eval()(features, sizes)
    counts = each.images.bincount().tolist()
    assert all(100 < count <= 200 for count in counts)
    together, _ = rpn.train()(features, sizes)
    assert len(together) == 200
    for image, count in enumerate([200 - counts[1], counts[1]]):
        kept = each.boxes[each.images == image][:count]
        torch.testing.assert_close(together.boxes[together.images == image], kept)


def test_losses_and_proposals_equal_torchvisions_when_all_anchors_are_sampled(monkeypatch):
    monkeypatch.setattr(rpn_module, "_SAMPLES", 100_000)
    monkeypatch.setattr(rpn_module, "_POSITIVE_FRACTION", 1.0)  # with so many samples, all negatives are chosen too
    ours = make_rpn(strides=(8,), train=50, test=50)
    nn.init.normal_(ours.head.cls_logits.weight, std=0.5)
    nn.init.normal_(ours.head.bbox_pred.weight, std=0.2)
    generator = AnchorGenerator(((32,),), (RATIOS,))
    # torchvision's own anchors are rounded and centered on the corner of a cell.
    generator.cell_anchors = [CONTINUOUS.cell_anchors(8, 32, RATIOS)]
    limits = {"training": 50, "inference": 50}
    theirs = TorchvisionRPN(generator, ours.head, 0.7, 0.3, 100_000, 1.0, limits, limits, 0.7)
    features, boxes = pyramid(strides=(8,)), [[[10, 10, 50, 40], [60, 60, 90, 110]], [[30, 20, 70, 60]]]
    images = ImageList(torch.zeros(2, 3, 128, 128), [(128, 128), (128, 128)])
    targets = [{"boxes": torch.tensor(b, dtype=torch.float32)} for b in boxes]
    expected_proposals, expected = theirs.train()(images, {"0": features[0]}, targets)
    proposals, losses = ours(features, torch.tensor([[128, 128]] * 2), make_ground_truth(*boxes))
    for image in range(2):
        torch.testing.assert_close(proposals.boxes[proposals.images == image], expected_proposals[image])
    for name, theirs_name in (("loss_rpn_objectness", "loss_objectness"), ("loss_rpn_box", "loss_rpn_box_reg")):
        torch.testing.assert_close(losses[name].total / losses[name].count, expected[theirs_name])


def test_anchors_are_labelled_by_iou_and_the_best_of_an_object_is_positive_at_any_iou(convention):
    rpn = make_rpn(convention=convention)
    anchors = torch.tensor(
        [
            [0.0, 0, 100, 100],
            [0, 0, 100, 80],
            [0, 0, 100, 50],
            [0, 0, 100, 20],
            [200, 200, 300, 240],
            [200, 200, 300, 230],
        ]
    )
    objects = make_ground_truth([[0, 0, 100, 100], [200, 200, 300, 300]])
    labels, boxes = rpn._assign(anchors, torch.tensor([[400, 400]]), objects)
    # IoU 1.0 and 0.8: object; 0.5: ignored; 0.2: background; 0.4, the best of the second object: object.
    assert labels[0, :5].tolist() == [1, 1, -1, 0, 1]
    assert labels[0, 5] != 1
    assert boxes[0, (0, 1, 4)].tolist() == [[0, 0, 100, 100]] * 2 + [[200, 200, 300, 300]]


def test_all_anchors_with_the_best_iou_of_an_object_are_positive():
    anchors = torch.tensor([[0.0, 0, 40, 100], [60, 0, 100, 100], [0, 0, 100, 31]])
    labels, _ = make_rpn()._assign(anchors, torch.tensor([[400, 400]]), make_ground_truth([[0, 0, 100, 100]]))
    assert labels.tolist() == [[1, 1, -1]]


def test_object_that_overlaps_no_anchor_has_no_positive_anchor():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    labels, _ = make_rpn()._assign(anchors, torch.tensor([[400, 400]]), make_ground_truth([[200, 200, 300, 300]]))
    assert labels.tolist() == [[0, 0]]


def test_anchors_that_cross_the_image_border_are_ignored_if_set(convention):
    last = 100 - convention.extra
    anchors = torch.tensor([[0.0, 0, 50, last], [-1, 0, 50, 50], [0, 0, last + 1, 50], [0, 0, 50, last + 1]])
    sizes = torch.tensor([[100, 100], [200, 200]])
    objects = make_ground_truth([[0, 0, 50, 99]], [[0, 0, 50, 99]])
    strict, _ = make_rpn(convention=convention, border=True)._assign(anchors, sizes, objects)
    assert (strict == -1).tolist()[0][1:] == [True] * 3
    assert strict[:, 0].tolist() == [1, 1]
    assert strict[1].tolist()[1] == -1
    assert strict[1].tolist()[3] == 1
    lenient, _ = make_rpn(convention=convention)._assign(anchors, sizes, objects)
    assert lenient[0, 3] == 1


def test_image_without_objects_is_all_background_and_its_neighbor_keeps_its_objects():
    anchors = level_anchors(CONTINUOUS, 8, 32, (8, 8), CPU)
    labels, boxes = make_rpn()._assign(
        anchors, torch.tensor([[64, 64]] * 2), make_ground_truth([], [[0, 0, 30, 30], [4, 4, 60, 60]])
    )
    assert (labels[0] == 0).all()
    assert (labels[1] == 1).any()
    assert boxes.shape == (2, len(anchors), 4)


def test_padding_of_the_ground_truth_makes_no_anchor_positive():
    anchors = torch.tensor([[0.0, 0, 1, 1], [10, 10, 30, 30]])
    rpn = make_rpn(convention=INCLUSIVE)  # in which a box of zeros has an area
    labels, _ = rpn._assign(
        anchors, torch.tensor([[64, 64]] * 2), make_ground_truth([[10, 10, 30, 30]], [[0, 0, 9, 9], [3, 3, 5, 5]])
    )
    assert labels[0].tolist() == [0, 1]


def crowd(count, seed):
    """Boxes of ``count`` objects, some of them equal, so that several have the same IoU with an anchor."""
    boxes = random_rois(count, 1, torch.Generator().manual_seed(seed)).boxes
    return torch.cat([boxes, boxes[:5]]).tolist()


@pytest.mark.parametrize("chunk", [1, 1000, 5000])
def test_matching_does_not_depend_on_how_many_objects_are_compared_at_once(convention, monkeypatch, chunk):
    rpn = make_rpn(convention=convention)
    anchors = level_anchors(convention, 8, 32, (16, 16), CPU)
    sizes, objects = torch.tensor([[128, 128]] * 3), make_ground_truth(crowd(40, 0), [], crowd(7, 1))
    iou = convention.iou(objects.boxes[:, :, None], anchors).masked_fill(~objects.valid[:, :, None], -1.0)
    best, index = iou.max(dim=1)
    is_best = ((iou == iou.amax(dim=2, keepdim=True)) & (iou > 0)).any(dim=1)
    labels = torch.where((best >= 0.7) | is_best, 1, torch.where(best < 0.3, 0, -1))
    monkeypatch.setattr(rpn_module, "_CHUNK", chunk)
    found, boxes = rpn._assign(anchors, sizes, objects)
    assert torch.equal(found, labels)
    assert torch.equal(boxes, objects.boxes.gather(1, index[..., None].expand(-1, -1, 4)))


def test_memory_of_matching_does_not_depend_on_the_number_of_objects(monkeypatch):
    monkeypatch.setattr(rpn_module, "_CHUNK", 4000)
    anchors = level_anchors(CONTINUOUS, 8, 32, (16, 16), CPU)
    for count in (3, 300):
        with LargestTensor() as largest:
            make_rpn()._assign(anchors, torch.tensor([[128, 128]] * 2), make_ground_truth(crowd(count, 0), crowd(1, 1)))
        # The matched boxes have four numbers for each anchor of the batch.
        assert largest.elements == 2 * len(anchors) * 4


def test_losses_are_means_over_the_sampled_anchors_of_the_batch():
    rpn = make_rpn()
    features, sizes = pyramid(), torch.tensor([[128, 128]] * 2)
    _, losses = rpn(features, sizes, make_ground_truth([[10, 10, 50, 40]], []))
    # The (16^2 + 8^2) * 3 anchors of an image are more than the 256 that are sampled.
    assert {name: int(term.count) for name, term in losses.items()} == {"loss_rpn_objectness": 512, "loss_rpn_box": 512}
    untrained = losses["loss_rpn_objectness"].total / 512
    torch.testing.assert_close(untrained, torch.tensor(2.0).log(), rtol=0.05, atol=0)


def test_box_loss_is_the_smooth_l1_loss_of_positive_anchors():
    rpn = make_rpn(strides=(8,))
    anchors = level_anchors(CONTINUOUS, 8, 32, (4, 4), CPU)
    objects = make_ground_truth([[2, 2, 30, 30]])
    logits, deltas = torch.zeros(1, len(anchors)), torch.randn(1, len(anchors), 4)
    losses = rpn._losses(logits, deltas, anchors, torch.tensor([[32, 32]]), objects)
    iou = box_iou(objects.boxes[0], anchors)[0]
    positive = (iou >= 0.7) | (iou == iou.max())
    encoded = CONTINUOUS.encode(objects.boxes[0], anchors[positive])
    expected = F.smooth_l1_loss(deltas[0, positive], encoded, beta=1 / 9, reduction="sum")
    torch.testing.assert_close(losses["loss_rpn_box"].total, expected)


def test_ignored_anchors_and_padded_objects_have_no_effect_on_losses_and_gradients():
    sizes, objects = torch.tensor([[32, 32]]), make_ground_truth([[2, 2, 30, 30]])
    inside = level_anchors(CONTINUOUS, 8, 8, (4, 4), CPU)
    crossing = inside + torch.tensor([40.0, 0, 40, 0])
    # Nothing is random, because there are fewer anchors than samples.
    rpn = make_rpn(strides=(8,), border=True)
    generator = torch.Generator().manual_seed(0)

    def losses_and_gradients(anchors, ground_truth, logits, deltas):
        logits, deltas = logits.clone().requires_grad_(), deltas.clone().requires_grad_()
        losses = rpn._losses(logits, deltas, anchors, sizes, ground_truth)
        sum(term.total for term in losses.values()).backward()
        return losses, logits.grad, deltas.grad

    logits = torch.randn(1, 2 * len(inside), generator=generator)
    deltas = torch.randn(1, 2 * len(inside), 4, generator=generator)
    count = len(inside)
    expected, *gradients = losses_and_gradients(inside, objects, logits[:, :count], deltas[:, :count])
    padded = GroundTruth(
        torch.cat([objects.boxes, torch.tensor([[[8.0, 8, 16, 16]]])], dim=1),
        torch.tensor([[1, 0]]),
        torch.tensor([[True, False]]),
        (1,),
    )
    losses, *with_ignored = losses_and_gradients(torch.cat([inside, crossing]), padded, logits, deltas)
    assert expected["loss_rpn_box"].total > 0
    for name, term in expected.items():
        torch.testing.assert_close(losses[name].total, term.total)
        assert losses[name].count == term.count
    for with_both, alone in zip(with_ignored, gradients):
        torch.testing.assert_close(with_both[:, :count], alone)
        assert not with_both[:, count:].any()


def test_batch_without_objects_has_finite_losses_and_gradients():
    rpn = make_rpn()
    _, losses = rpn(pyramid(), torch.tensor([[128, 128]] * 2), make_ground_truth([], []))
    assert losses["loss_rpn_box"].total.item() == 0
    sum(term.total / term.count for term in losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rpn.parameters())


def test_proposals_of_an_image_do_not_depend_on_the_batch():
    rpn = make_rpn().eval()
    nn.init.normal_(rpn.head.cls_logits.weight, std=1.0)
    features, sizes = pyramid(batch=3), torch.tensor([[128, 128], [100, 90], [64, 128]])
    together, _ = rpn(features, sizes)
    for image in range(3):
        alone, _ = rpn([x[image : image + 1] for x in features], sizes[image : image + 1])
        torch.testing.assert_close(together.boxes[together.images == image], alone.boxes)
