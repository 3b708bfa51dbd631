"""DetectionModule under Lightning: learning rate, logged losses, precision and hyperparameters."""

import builtins

import pytest
import torch

from cpm_rcnn.data import shapes
from cpm_rcnn.data.samplers import collate
from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.training.module import DetectionModule
from small_models import CATEGORIES, SIZES, TwoImages, is_plain, shapes_data, small_module, small_trainer


@pytest.mark.parametrize(("accumulate", "images"), [(1, 2), (2, 4)])
def test_the_learning_rate_scales_with_the_images_of_an_optimizer_step(accumulate, images):
    model = small_module(schedule={"base_lr": 0.16})
    small_trainer(accumulate_grad_batches=accumulate).fit(model, datamodule=TwoImages())
    groups = model.optimizers().param_groups
    assert groups[0]["initial_lr"] == pytest.approx(0.16 * images / 16)
    assert groups[-1]["initial_lr"] == pytest.approx(2 * 0.16 * images / 16)


def test_each_loss_is_logged_by_its_name_and_the_total_is_their_sum():
    model = small_module()
    trainer = small_trainer(log_every_n_steps=1)
    trainer.fit(model, datamodule=TwoImages())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
    parts = {f"loss_{part}" for part in ("rpn_objectness", "rpn_box", "cls", "grid0", "grid1", "grid2", "ism", "rsm")}
    assert set(logged) == {"train/loss", *(f"train/{part}" for part in parts)}
    assert logged["train/loss"] == pytest.approx(sum(v for k, v in logged.items() if k != "train/loss"), rel=1e-5)
    assert {name: float(value) for name, value in model.losses.items()} == {k: logged[f"train/{k}"] for k in parts}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_changes_the_weights_in_every_precision(precision):
    model = small_module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small_trainer(precision=precision).fit(model, datamodule=TwoImages())
    after = model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_hyperparameters_are_plain_values_that_build_the_module_again():
    model = small_module(stages=[{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0}])
    assert is_plain(dict(model.hparams))
    again = DetectionModule(**model.hparams)
    again.load_state_dict(model.state_dict())
    assert again.hparams == model.hparams
    assert again.detector.class_names == ["cat", "dog"]


def test_the_constructor_reads_no_file(monkeypatch, tmp_path):
    arguments = {"model": {"backbone": {"name": "resnet18", "weights": str(tmp_path / "absent.pth")}}}
    arguments |= {"categories": CATEGORIES, "schedule": {}, "data": SIZES}

    def refuse(path, *arguments, **options):
        raise AssertionError(f"opens {path}")

    with torch.device("meta"), monkeypatch.context() as patched:
        patched.setattr(builtins, "open", refuse)
        patched.setattr(torch, "load", refuse)
        DetectionModule(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"backbone": "tiny", "nms_iou": 2}}, "^nms_iou=2: must be a number"),
        ({"model": {"backbone": "tiny", "color": 1}}, "color: the head cpm has no such option"),
        ({"schedule": {"steps": 1}}, "^schedule: unknown key steps"),
        ({"schedule": {"max_steps": 0}}, "^schedule.max_steps=0: must be an integer"),
        ({"data": {"test_short_side": 0}}, "^test_short_side=0: must be an integer"),
        ({"categories": []}, "^num_classes=0"),
    ],
)
def test_invalid_arguments_are_refused_by_name(change, message):
    arguments = {"model": {"backbone": "tiny"}, "categories": CATEGORIES, "schedule": {}, "data": {}}
    with pytest.raises(ArgumentError, match=message):
        DetectionModule(**{**arguments, **change})


def test_another_format_is_refused():
    with pytest.raises(UserError, match="of checkpoint format 99"):
        DetectionModule({"backbone": "tiny"}, CATEGORIES, {}, {}, format=99)


def test_a_number_of_epochs_is_trained_in_full():
    trainer = small_trainer(max_steps=-1, max_epochs=3)
    trainer.fit(small_module(), datamodule=TwoImages())
    assert (trainer.global_step, trainer.current_epoch) == (6, 3)


@pytest.fixture
def images(tmp_path):
    """A data set of shapes, as a data set of torch, and its data module."""
    shapes.write_shapes(tmp_path / "shapes", 4, 2)
    data = shapes_data(tmp_path / "shapes")
    return data.val_dataloader().dataset, data


def loader(dataset):
    return torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collate)


def test_the_module_trains_and_is_evaluated_with_loaders_only(images):
    dataset, data = images
    model = small_module(shapes.CATEGORIES, schedule={"base_lr": 0.16})
    trainer = small_trainer(max_steps=-1, max_epochs=2)
    trainer.fit(model, loader(dataset), loader(dataset))
    assert trainer.global_step == 2
    # With 2 images per step, as the schedule says.
    assert model.optimizers().param_groups[0]["initial_lr"] == pytest.approx(0.16 * 2 / 16)
    by_loader = model.metrics
    assert 0 <= by_loader["AP"] <= 1
    small_trainer().validate(model, data, verbose=False)
    assert by_loader["AP"] == pytest.approx(model.metrics["AP"])
    small_trainer().test(model, loader(dataset), verbose=False)
    assert by_loader["AP"] == pytest.approx(model.metrics["AP"])


def test_an_evaluation_without_annotations_is_refused_in_one_line(images):
    plain = [images[0][0], images[0][1]]
    with pytest.raises(UserError, match=r"^val loader over list: an evaluation needs a CocoDataModule, or one loader"):
        small_trainer().validate(small_module(shapes.CATEGORIES), loader(plain), verbose=False)


def test_predict_returns_detections_in_pixels_of_the_original_images(images):
    dataset, _ = images
    model = small_module(shapes.CATEGORIES)
    (batch,) = small_trainer().predict(model, loader(dataset))
    expected = model.detector.detect([dataset.images.read(str(name), None) for name in dataset.annotations.file_names])
    assert len(batch) == len(expected) == 2
    for found, wanted in zip(batch, expected):
        assert set(found) == {"boxes", "scores", "labels"}
        assert len(found["boxes"]) == len(wanted.boxes) > 0
        assert found["boxes"].max() > max(SIZES.values())  # larger than the network's input


def test_the_check_of_lightning_before_a_training_gives_no_operating_points(images):
    dataset, _ = images
    model = small_module(shapes.CATEGORIES)
    trainer = small_trainer(max_steps=1, num_sanity_val_steps=1, limit_val_batches=1, val_check_interval=1.0)
    before = []
    step = model.training_step
    model.training_step = lambda *batch: before.append(model.detector.operating_points) or step(*batch)
    trainer.fit(model, loader(dataset), loader(dataset))
    assert before == [None]
    assert model.detector.operating_points is not None


def test_operating_points_are_saved_with_the_weights_that_they_were_found_with(images, tmp_path):
    dataset, _ = images
    model = small_module(shapes.CATEGORIES)
    trainer = small_trainer(max_steps=-1, max_epochs=1)
    trainer.fit(model, loader(dataset), loader(dataset))
    trainer.save_checkpoint(tmp_path / "validated.ckpt")
    found = model.detector.operating_points
    assert torch.load(tmp_path / "validated.ckpt", weights_only=True)["operating_points"] == found is not None
    assert DetectionModule.load_from_checkpoint(tmp_path / "validated.ckpt").detector.operating_points == found
    assert is_plain(found)
    again = small_trainer(max_steps=-1, max_epochs=1, limit_val_batches=0)
    again.fit(model, loader(dataset), loader(dataset))
    again.save_checkpoint(tmp_path / "trained.ckpt")
    assert "operating_points" not in torch.load(tmp_path / "trained.ckpt", weights_only=True)
    assert DetectionModule.load_from_checkpoint(tmp_path / "trained.ckpt").detector.operating_points is None
