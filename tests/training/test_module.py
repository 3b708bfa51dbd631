"""DetectionModule under Lightning: learning rate, logged losses, precision and hyperparameters."""

import builtins

import pytest
import torch

from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.training.module import DetectionModule
from small_models import CATEGORIES, SIZES, TwoImages, is_plain, small_module, small_trainer


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
        ({"model": {"backbone": "tiny", "color": 1}}, "unknown key color"),
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
