"""EvaluationModule under Lightning: unreadable images, splits, and metrics of one's own."""

import json

import pytest
import torch
from torchmetrics import Metric

from cpm_rcnn.data import shapes
from cpm_rcnn.errors import UserError
from cpm_rcnn.evaluation.coco_metric import METRIC_NAMES, CocoMetric
from cpm_rcnn.evaluation.module import EvaluationModule
from small_models import shapes_data, small_module, small_trainer


@pytest.fixture
def root(tmp_path):
    shapes.write_shapes(tmp_path / "shapes", 1, 4)
    return tmp_path / "shapes"


def shapes_module(data):
    return small_module(categories=shapes.CATEGORIES, data=data.evaluation_arguments)


def test_skipped_images_and_annotations_do_not_stop_an_evaluation_and_have_no_detections(root, caplog):
    path = root / "annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [float("nan")] * 4
    content["images"].append({"id": 5, "file_name": "../5.jpg", "height": 9, "width": 9})
    path.write_text(json.dumps(content))
    unreadable = content["images"][2]
    (root / "val" / unreadable["file_name"]).write_bytes(b"")

    def evaluated(on_error):
        data = shapes_data(root, on_error=on_error)
        model = shapes_module(data)
        small_trainer().validate(model, data, verbose=False)
        return model

    with pytest.raises(UserError, match=r"image 5: '\.\./5\.jpg'.*; 1 annotation whose bbox is not four finite"):
        evaluated("raise")
    model = evaluated("skip")
    assert {found["image_id"] for found in model.metric.results()} == {1, 2, 3, 4} - {unreadable["id"]}
    assert 0 <= model.metrics["AP"] <= 1
    assert model.hparams["data"]["on_error"] == "skip"
    assert len([line for line in caplog.messages if "on_error=skip" in line]) == 2


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_metrics_of_a_split_are_logged_under_its_name(root, split):
    files = {"test_json": "annotations/instances_val.json", "test_images": "val"} if split == "test" else {}
    data = shapes_data(root, **files)
    module = EvaluationModule(shapes_module(data).detector)
    trainer = small_trainer()
    {"val": trainer.validate, "test": trainer.test}[split](module, data, verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert set(logged) == {f"{split}/{name}" for name in METRIC_NAMES}
    assert logged[f"{split}/AP"] == pytest.approx(module.metrics["AP"])
    assert list(module.metrics["per_class"]) == list(shapes.CLASSES)
    assert isinstance(module.metric, CocoMetric)


def test_detections_are_evaluated_in_pixels_of_the_original_images(root):
    data = shapes_data(root)
    module = shapes_module(data)
    small_trainer().validate(module, data, verbose=False)
    found = {}
    for result in module.metric.results():
        found.setdefault(result["image_id"], []).append(result)
    annotations = data.annotations("val")
    for image_id, name in zip(annotations.image_ids.tolist(), annotations.file_names):
        (expected,) = module.detector.detect([root / "val" / str(name)])
        boxes = module.detector.convention.to_xywh(expected.boxes)
        ours = torch.tensor([result["bbox"] for result in found[image_id]])
        assert len(ours) == len(boxes) > 0
        torch.testing.assert_close(ours.sort(0).values, boxes.sort(0).values, rtol=1e-4, atol=1e-3)


def test_evaluation_of_weights_that_are_not_finite_does_not_start(root):
    data = shapes_data(root)
    module = shapes_module(data)
    next(module.model.rpn.parameters()).data[0] = float("nan")
    with pytest.raises(UserError, match=r"^the model: 1 of \d+ tensors .* the first is rpn\.head\."):
        small_trainer().validate(module, data, verbose=False)


class CountDetections(Metric):
    """The number of detections per image."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_state("detections", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, image_ids, detections):
        self.images += len(image_ids)
        self.detections += sum(len(found["scores"]) for found in detections)

    def compute(self):
        return {self.name: self.detections.item() / self.images.item(), "comment": "not a float"}


class CountingModule(EvaluationModule):
    def configure_metrics(self, annotations):
        return CountDetections(f"per_image_of_{len(annotations)}")


def test_a_metric_of_one_s_own_replaces_coco_s_and_its_floats_are_logged(root):
    data = shapes_data(root)
    detector = shapes_module(data).detector
    module, trainer = CountingModule(detector), small_trainer()
    for _ in range(2):  # each evaluation starts with a new metric
        trainer.validate(module, data, verbose=False)
        assert list(trainer.callback_metrics) == ["val/per_image_of_4"]
        found = detector.detect(sorted((root / "val").iterdir()))
        assert module.metrics["per_image_of_4"] == sum(map(len, found)) / 4
        assert float(trainer.callback_metrics["val/per_image_of_4"]) == pytest.approx(sum(map(len, found)) / 4)
    assert module.metrics["comment"] == "not a float"


class PersistentModule(EvaluationModule):
    def configure_metrics(self, annotations):
        metric = CountDetections("count")
        metric.persistent(True)
        metric.layer = torch.nn.Linear(2, 2)
        return metric


def test_the_states_and_weights_of_a_metric_are_not_part_of_the_checkpoint(root):
    data = shapes_data(root)
    module = PersistentModule(shapes_module(data).detector)
    names = list(module.state_dict())
    small_trainer().validate(module, data, verbose=False)
    assert module.metrics["count"] >= 0
    assert "detections" in module.metric.state_dict()
    assert list(module.state_dict()) == names
