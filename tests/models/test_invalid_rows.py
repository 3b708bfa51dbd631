"""Invalid rows have no effect: a loss has the same value, count and gradient as without them.

The same property of the RPN's ignored anchors is tested in test_rpn.py, of a whole head in test_cpm_head.py.
"""

import pytest
import torch
from inputs import head_inputs, random_rois

from cpm_rcnn.models.heads.box_stage import BoxOutput, BoxStage, BoxStageSettings
from cpm_rcnn.models.heads.classification import classification_loss
from cpm_rcnn.models.heads.grid_stage import GridOutput, GridStage, StageSettings
from cpm_rcnn.models.heads.scoring import instance_score_loss
from cpm_rcnn.models.heatmaps import grid_loss
from cpm_rcnn.models.structures import Match, Rois

ROWS = 6
VALID = torch.tensor([True, False, True, True, False, True])


def classification(predictions, rows, valid):
    return classification_loss(predictions, rows % 4, valid)


def instance_score(predictions, rows, valid):
    return instance_score_loss(predictions, rows / ROWS, valid)


def grid(predictions, rows, valid):
    targets = torch.rand(ROWS, 9, 28, 28, generator=torch.Generator().manual_seed(1)) < 0.1
    return grid_loss(predictions, targets[rows], valid)


def grid_stage(predictions, rows, valid):
    stage = GridStage(StageSettings(0.5, 1.0, 0.5), head_inputs(), point_channels=4, num_convs=1, fusion=True)
    rois = random_rois(ROWS, 2, torch.Generator().manual_seed(1))[rows]
    match = Match(torch.ones(len(rows)), rois.boxes + 3, torch.ones(len(rows), dtype=torch.int64))
    output = GridOutput(torch.zeros(0), predictions, 2 * predictions)
    return stage.losses(output, Rois(rois.boxes, rois.images, valid), match)["grid"]


def box_stage(predictions, rows, valid):
    """The box loss; invalid rows have empty boxes, whose deltas are not finite."""
    stage = BoxStage(BoxStageSettings(), head_inputs(), mlp_channels=4, class_agnostic=True)
    rois = random_rois(ROWS, 2, torch.Generator().manual_seed(1))[rows]
    match = Match(torch.ones(len(rows)), rois.boxes + 3, torch.ones(len(rows), dtype=torch.int64))
    boxes = torch.where(valid[:, None], rois.boxes, 0.0)
    output = BoxOutput(torch.zeros(0), torch.zeros(len(rows), 4), predictions)
    return stage.losses(output, Rois(boxes, rois.images, valid), match)["box"]


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (classification, (4,)),
        (instance_score, (2,)),
        (grid, (9, 28, 28)),
        (grid_stage, (9, 28, 28)),
        (box_stage, (1, 4)),
    ],
    ids=["classification_loss", "instance_score_loss", "grid_loss", "GridStage.losses", "BoxStage.losses"],
)
@pytest.mark.parametrize("valid", [VALID, torch.zeros(ROWS, dtype=torch.bool)], ids=["some", "none"])
def test_loss_ignores_invalid_rows(loss, shape, valid):
    predictions = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0))
    masked, selected = predictions.clone().requires_grad_(), predictions[valid].requires_grad_()
    rows = torch.arange(ROWS)
    term = loss(masked, rows, valid)
    expected = loss(selected, rows[valid], valid[valid])
    torch.testing.assert_close(term.total, expected.total)
    assert term.count == expected.count
    term.total.backward()
    expected.total.backward()
    torch.testing.assert_close(masked.grad[valid], selected.grad)
    assert not masked.grad[~valid].any()
