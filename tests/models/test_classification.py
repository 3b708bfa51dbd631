import pytest
import torch
import torch.nn.functional as F
from inputs import head_inputs, random_pyramid, random_rois
from torchvision.ops import nms

from cpm_rcnn.models.heads.classification import Classifier, classification_loss, probability_of, select_detections
from cpm_rcnn.models.structures import Rois


def slow_selection(probabilities, rois, score_threshold, nms_iou):
    """(image, label, row) of every detection, class by class and image by image."""
    found = set()
    for image in rois.images.unique().tolist():
        for label in range(1, probabilities.shape[1]):
            rows = ((rois.images == image) & (probabilities[:, label] > score_threshold)).nonzero().squeeze(1)
            kept = nms(rois.boxes[rows], probabilities[rows, label], nms_iou)
            found |= {(image, label, row) for row in rows[kept].tolist()}
    return found


@pytest.mark.parametrize("count", [40, 700])
def test_detections_equal_separate_nms_for_each_class_and_image(count):
    generator = torch.Generator().manual_seed(count)
    rois = random_rois(count, 3, generator)
    probabilities = torch.softmax(2 * torch.randn(count, 5, generator=generator), dim=1)
    kept, scores, labels, _ = select_detections(probabilities, rois, score_threshold=0.1, nms_iou=0.3)
    rows = (kept.boxes[:, None] == rois.boxes).all(dim=2).int().argmax(dim=1)
    found = list(zip(kept.images.tolist(), labels.tolist(), rows.tolist()))
    assert set(found) == slow_selection(probabilities, rois, 0.1, 0.3)
    assert len(found) == len(set(found))
    assert torch.equal(scores, probabilities[rows, labels])
    assert torch.equal(scores, scores.sort(descending=True).values)


def test_one_roi_can_give_several_classes_but_not_background():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.98, 0.01, 0.01]])
    rois = Rois.of(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]]), torch.tensor([0, 0]))
    _, scores, labels, _ = select_detections(probabilities, rois, score_threshold=0.03, nms_iou=0.3)
    assert labels.tolist() == [1, 2]
    assert scores.tolist() == pytest.approx([0.3, 0.2])


def test_score_equal_to_the_threshold_is_dropped():
    rois = Rois.of(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0]))
    kept, *_ = select_detections(torch.tensor([[0.75, 0.25]]), rois, score_threshold=0.25, nms_iou=0.3)
    assert len(kept) == 0


def test_invalid_roi_is_not_detected_and_suppresses_no_other():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60]])
    rois = Rois(boxes, torch.tensor([0, 0, 0]), torch.tensor([False, True, True]))
    probabilities = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    kept, scores, *_ = select_detections(probabilities, rois, score_threshold=0.03, nms_iou=0.3)
    assert torch.equal(kept.boxes, boxes[1:])
    assert torch.equal(scores, probabilities[1:, 1])


def test_low_scores_and_an_empty_set_of_rois_give_no_detections():
    for count in (0, 3):
        rois = random_rois(count, 1, torch.Generator().manual_seed(0))
        kept, scores, labels, _ = select_detections(
            torch.full((count, 4), 0.01), rois, score_threshold=0.03, nms_iou=0.3
        )
        assert (kept.boxes.shape, kept.images.shape, scores.shape, labels.shape) == ((0, 4), (0,), (0,), (0,))
        assert labels.dtype == torch.int64


def test_detections_of_an_image_do_not_depend_on_its_position_in_a_large_batch():
    # Boxes with fractional coordinates whose IoU is near the threshold; 16 images, 80 classes, real image size.
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(8, 2, generator=generator) * 1000
    boxes = torch.cat([corner, corner + 30], dim=1)
    shift = 30 * (1 - 0.3) / (1 + 0.3)  # IoU 0.3
    near = boxes + torch.tensor([1.0, 0, 1, 0]) * (shift + torch.linspace(-0.02, 0.02, 8)[:, None])
    one = torch.cat([boxes, near])
    rois = Rois.of(one.repeat(16, 1), torch.arange(16).repeat_interleave(len(one)))
    probabilities = torch.zeros(len(rois), 81)
    probabilities[:, 80] = torch.linspace(0.9, 0.5, len(one)).repeat(16)
    kept, *_ = select_detections(probabilities, rois, score_threshold=0.03, nms_iou=0.3)
    first = kept.boxes[kept.images == 0]
    for image in range(1, 16):
        assert torch.equal(kept.boxes[kept.images == image], first)


def test_loss_is_the_mean_cross_entropy_in_float32():
    logits, labels, valid = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0]), torch.ones(6, dtype=torch.bool)
    term = classification_loss(logits, labels, valid)
    torch.testing.assert_close(term.total / term.count, F.cross_entropy(logits, labels))
    half = classification_loss(logits.bfloat16(), labels, valid)
    assert half.total.dtype == torch.float32
    torch.testing.assert_close(half.total, classification_loss(logits.bfloat16().float(), labels, valid).total)
    assert classification_loss(logits[:0], labels[:0], valid[:0]).total.item() == 0


def test_probability_of_a_label_is_its_softmax():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    expected = torch.stack([torch.softmax(row, 0)[label] for row, label in zip(logits, labels)])
    torch.testing.assert_close(probability_of(logits, labels), expected)
    assert probability_of(logits.bfloat16(), labels).dtype == torch.float32
    assert probability_of(logits[:0], labels[:0]).shape == (0,)


def test_classifier_gives_one_row_per_roi_and_starts_with_small_logits():
    classifier = Classifier(head_inputs(num_classes=5), 16)
    logits = classifier(random_pyramid(size=64), random_rois(7, 2, torch.Generator().manual_seed(0)))
    assert logits.shape == (7, 6)
    assert logits.abs().max() < 1
    assert all((layer.bias == 0).all() for layer in (classifier.predictor, classifier.mlp.fc6, classifier.mlp.fc7))
    assert 0.007 < classifier.predictor.weight.std() < 0.013
