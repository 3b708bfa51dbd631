"""Every head, with every combination of ISM and RSM, can learn one batch by heart."""

import itertools

import pytest
import torch
from torchvision.ops import box_iou

from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.heads import HEADS

STEPS = 60


def batch():
    """Two images of 96 x 96 pixels with a bright and a dark rectangle each."""
    images, targets = [], []
    for bright, dark in (((8, 12, 40, 60), (50, 40, 90, 80)), ((30, 8, 80, 36), (10, 50, 44, 90))):
        image = torch.full((3, 96, 96), 110, dtype=torch.uint8)
        for (x1, y1, x2, y2), value in ((bright, 230), (dark, 20)):
            image[:, y1:y2, x1:x2] = value
        images.append(image)
        targets.append({"boxes": torch.tensor([bright, dark], dtype=torch.float32), "labels": torch.tensor([1, 2])})
    return images, targets


def assert_learned(found, targets):
    """Assert that the best detection of each object has its label."""
    for detections, target in zip(found, targets):
        for box, label in zip(target["boxes"], target["labels"]):
            iou = box_iou(box[None], detections["boxes"])[0]
            hits = (detections["labels"] == label) & (iou > 0.6)
            assert hits.any()
            assert detections["scores"][hits].max() > 0.3
            # Nothing of the other class scores as high.
            wrong = detections["labels"] != label
            on_object = wrong & (iou > 0.6)
            assert not on_object.any() or detections["scores"][on_object].max() < detections["scores"][hits].max()


@pytest.mark.parametrize(("head", "ism", "rsm"), list(itertools.product(HEADS, (False, True), (False, True))))
def test_one_batch_is_learned_and_found_in_bfloat16_too(head, ism, rsm):
    torch.manual_seed(0)
    grid = {"point_channels": 8, "grid_convs": 2, "max_grid_rois": 12} if head == "cpm" else {}
    detector = build_detector(
        "tiny",
        2,
        head=head,
        ism=ism,
        rsm=rsm,
        fpn_channels=32,
        mlp_channels=64,
        samples=32,
        anchor_sizes=(8, 16, 32, 64, 128),
        ignore_border_anchors=False,
        proposals_train=100,
        proposals_test=50,
        **grid,
    )
    images, targets = batch()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(STEPS):
        losses = detector(images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        found = detector.eval()(images)
        assert_learned(found, targets)
        detector.optimize(torch.bfloat16)
        rounded = detector(images)
    assert_learned(rounded, targets)
    for mine, theirs in zip(rounded, found):
        sure = theirs["scores"] > 0.3
        alike = (box_iou(theirs["boxes"], mine["boxes"]) > 0.9) & (theirs["labels"][:, None] == mine["labels"])
        difference = (theirs["scores"][:, None] - mine["scores"]).abs().masked_fill(~alike, 1).amin(1)
        assert difference[sure].max() < 0.05
