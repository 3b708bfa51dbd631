"""EvaluationModule under Lightning: unreadable images, splits, and metrics of one's own."""

import json

import pytest
import pytorch_lightning as pl
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

    def with_errors(on_error):
        data = shapes_data(root, on_error=on_error)
        model = shapes_module(data)
        small_trainer().validate(model, data, verbose=False)
        return model

    with pytest.raises(UserError, match=r"image 5: '\.\./5\.jpg'.*; 1 annotation whose bbox is not four finite"):
        with_errors("raise")
    model = with_errors("skip")
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


def evaluated(module, data, split="val", **options):
    trainer = small_trainer(**options)
    {"val": trainer.validate, "test": trainer.test}[split](module, data, verbose=False)
    return module


def test_a_validation_finds_the_operating_points_of_the_detector(root):
    data = shapes_data(root)
    module = evaluated(EvaluationModule(shapes_module(data).detector, operating_precision=0.5), data)
    expected = module.metric.operating_points(0.5)
    assert list(expected["classes"]) == list(shapes.CLASSES)
    assert sum(each["objects"] for each in expected["classes"].values()) == len(data.annotations("val").labels)
    assert module.operating_points == module.detector.operating_points == expected
    assert expected["target_precision"] == 0.5


def test_those_of_a_test_split_are_not_the_detector_s(root):
    data = shapes_data(root, test_json="annotations/instances_val.json", test_images="val")
    module = evaluated(EvaluationModule(shapes_module(data).detector), data, "test")
    assert module.operating_points["target_precision"] == 0.9
    assert module.detector.operating_points is None


def test_only_evaluated_images_count(root):
    data = shapes_data(root, eval_batch_size=1)
    module = evaluated(EvaluationModule(shapes_module(data).detector), data, limit_val_batches=1)
    counts = sum(each["objects"] for each in module.operating_points["classes"].values())
    assert counts == data.annotations("val").offsets[1]


def test_one_process_finds_operating_points(root, monkeypatch):
    data = shapes_data(root)
    module = EvaluationModule(shapes_module(data).detector)
    monkeypatch.setattr(CocoMetric, "operating_points", lambda *arguments: pytest.fail("called"))
    monkeypatch.setattr(pl.Trainer, "is_global_zero", property(lambda trainer: False))
    assert evaluated(module, data).operating_points is None
    assert module.metrics["AP"] >= 0


def test_a_metric_without_operating_points_is_accepted(root):
    data = shapes_data(root)
    module = evaluated(CountingModule(shapes_module(data).detector), data)
    assert module.operating_points is module.detector.operating_points is None


def test_detections_have_details_on_request(root):
    data = shapes_data(root)
    detector = shapes_module(data).detector
    for details in (False, True):
        module = evaluated(EvaluationModule(detector, details), data)
        keys = {"class_score", "predicted_iou", "rsm_probability"} & set(module.metric.results(details=True)[0])
        assert len(keys) == (3 if details else 0)
