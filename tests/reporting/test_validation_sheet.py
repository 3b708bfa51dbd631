"""The picture of detections in validation images."""

import pytest
import torch
from PIL import Image

from cpm_rcnn.data import shapes
from cpm_rcnn.reporting import validation_sheet as module
from cpm_rcnn.reporting.validation_sheet import validation_sheet
from small_models import shapes_data, small_module


@pytest.fixture
def data(tmp_path):
    shapes.write_shapes(tmp_path / "shapes", 1, 5)
    return shapes_data(tmp_path / "shapes")


@pytest.mark.parametrize(("count", "rows"), [(1, [0]), (2, [0, 2]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_the_images_are_spread_evenly_over_the_data_set_and_drawn_with_their_boxes(
    data, tmp_path, monkeypatch, count, rows
):
    drawn, draw = [], module.draw

    def recording_draw(image, detections, names, ground_truth):
        drawn.append((detections, ground_truth["image_id"]))
        return draw(image, detections, names, ground_truth=ground_truth)

    monkeypatch.setattr(module, "draw", recording_draw)
    detector = small_module(categories=shapes.CATEGORIES).detector
    dataset = data.val_dataloader().dataset
    validation_sheet(detector, dataset, tmp_path / "sheet.png", count)
    assert [image_id for _, image_id in drawn] == [dataset[row][1]["image_id"] for row in rows]
    image, _ = dataset[0]
    (expected,) = detector.detect([image])
    # The boxes are in pixels of the image that is drawn, the one that the data set returns.
    assert drawn[0][0]["boxes"].shape == expected.boxes.shape
    assert (drawn[0][0]["boxes"] - expected.boxes).abs().max() < 1e-3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 480


def test_large_images_are_drawn_smaller_with_their_boxes(data, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "_MAX_SIDE", 60)

    def recording_draw(image, detections, names, ground_truth):
        drawn.append((image, detections, ground_truth))
        return image

    monkeypatch.setattr(module, "draw", recording_draw)
    detector = small_module(categories=shapes.CATEGORIES).detector
    dataset = data.val_dataloader().dataset
    validation_sheet(detector, dataset, tmp_path / "sheet.png", 1)
    ((picture, found, truth),) = drawn
    image, target = dataset[0]
    assert max(picture.shape) == 60
    y, x = (small / large for small, large in zip(picture.shape[1:], image.shape[1:]))
    (expected,) = detector.detect([image])
    torch.testing.assert_close(found["boxes"], expected.boxes * torch.tensor([x, y, x, y]), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(truth["boxes"], target["boxes"] * torch.tensor([x, y, x, y]))
