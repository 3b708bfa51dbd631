"""Detections in the forms of other programs."""

import builtins
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cpm_rcnn.boxes import CONTINUOUS, INCLUSIVE
from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import ImageDetections


def detections(convention=CONTINUOUS, **details):
    return ImageDetections(
        boxes=torch.tensor([[1.0, 2.0, 11.0, 22.0], [0.5, 0.5, 3.5, 4.5]]),
        scores=torch.tensor([0.75, 0.5]),
        labels=torch.tensor([2, 1]),
        names=["dog", "cat"],
        category_ids=[18, 17],
        convention=convention,
        **details,
    )


def test_coco_s_results_are_plain_values():
    rows = detections(predicted_iou=torch.tensor([0.25, 1.0])).to_coco(7)
    assert json.loads(json.dumps(rows)) == [
        {"image_id": 7, "category_id": 18, "bbox": [1, 2, 10, 20], "score": 0.75, "predicted_iou": 0.25},
        {"image_id": 7, "category_id": 17, "bbox": [0.5, 0.5, 3, 4], "score": 0.5, "predicted_iou": 1.0},
    ]
    assert detections(INCLUSIVE).to_coco(7)[0]["bbox"] == [1, 2, 11, 21]


def test_above_takes_one_threshold_or_one_per_class():
    assert detections().above(0.75).names == ["dog"]
    assert detections().above([0.5, 0.9]).names == ["cat"]


@pytest.mark.parametrize(("convention", "right"), [(CONTINUOUS, 11), (INCLUSIVE, 12)])
def test_supervision_gets_edges_classes_from_0_and_names(monkeypatch, convention, right):
    monkeypatch.setitem(__import__("sys").modules, "supervision", SimpleNamespace(Detections=dict))
    given = detections(convention)
    found = given.to_supervision()
    assert found["xyxy"][0].tolist() == [1, 2, right, right + 11]
    assert found["class_id"].tolist() == [1, 0]
    assert found["confidence"].dtype == np.float32
    assert found["data"]["class_name"].tolist() == ["dog", "cat"]
    assert given.boxes[0, 2] == 11


def test_supervision_missing_is_one_line(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name == "supervision":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install supervision"):
        detections().to_supervision()
