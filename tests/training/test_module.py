"""The module under Lightning: the learning rate that it asks for, and what it logs and stores."""

import json

import pytest
import pytorch_lightning as pl
import torch

from cpm_rcnn.data import CocoDataModule, shapes
from cpm_rcnn.errors import UserError
from cpm_rcnn.training.module import DetectionModule, to_original

SMALL = {
    "backbone": {"name": "tiny"},
    "fpn_channels": 16,
    "mlp_channels": 16,
    "point_channels": 4,
    "grid_convs": 1,
    "convention": "continuous",
}
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]


def module(**schedule):
    recipe = {"max_steps": 2, "milestones": [], "warmup_steps": 0, **schedule}
    return DetectionModule(model=SMALL, categories=CATEGORIES, schedule=recipe, data={})


class Photos(pl.LightningDataModule):
    """Two images a step, one object each."""

    batch_size = 2

    def train_dataloader(self):
        image = torch.full((3, 64, 64), 90, dtype=torch.uint8)
        target = {"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([2])}
        batch = ([image, image], [target, target])
        return torch.utils.data.DataLoader([batch, batch], batch_size=None)


def trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize(("accumulate", "images"), [(1, 2), (2, 4)])
def test_the_rate_scales_with_the_images_of_an_optimizer_step(accumulate, images):
    model = module(base_lr=0.16)
    trainer(accumulate_grad_batches=accumulate).fit(model, datamodule=Photos())
    groups = model.optimizers().param_groups
    assert groups[0]["initial_lr"] == pytest.approx(0.16 * images / 16)
    assert groups[-1]["initial_lr"] == pytest.approx(2 * 0.16 * images / 16)


def test_each_loss_is_logged_by_its_name_and_the_total_is_their_sum():
    model = module()
    run = trainer(log_every_n_steps=1)
    run.fit(model, datamodule=Photos())
    logged = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("train/")}
    parts = {f"loss_{part}" for part in ("rpn_objectness", "rpn_box", "cls", "grid0", "grid1", "grid2", "ism", "rsm")}
    assert set(logged) == {"train/loss", *(f"train/{part}" for part in parts)}
    assert logged["train/loss"] == pytest.approx(sum(v for k, v in logged.items() if k != "train/loss"), rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_changes_the_weights_in_every_precision(precision):
    model = module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(precision=precision).fit(model, datamodule=Photos())
    after = model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_hyperparameters_are_plain_values_that_build_the_module_again():
    model = module()
    again = DetectionModule(**model.hparams)
    again.load_state_dict(model.state_dict())
    assert again.class_names == ["cat", "dog"]


def test_boxes_go_back_to_the_image_as_stored():
    boxes = torch.tensor([[10.0, 20, 30, 40]])
    torch.testing.assert_close(to_original(boxes, (100, 200), (50, 400)), torch.tensor([[20.0, 10, 60, 20]]))


def test_skipped_images_and_annotations_do_not_stop_an_evaluation_nor_count_as_found(tmp_path, caplog):
    root = tmp_path / "shapes"
    shapes.write_shapes(root, 1, 4)
    path = root / "annotations/instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [float("nan")] * 4
    content["images"].append({"id": 5, "file_name": "../5.jpg", "height": 9, "width": 9})
    path.write_text(json.dumps(content))
    unreadable = content["images"][2]
    (root / "val" / unreadable["file_name"]).write_bytes(b"")

    def evaluated(on_error):
        data = CocoDataModule(
            **{"root": str(root), "train_json": None, "train_images": None, "num_workers": 0, "on_error": on_error},
            **{"val_json": "annotations/instances_val.json", "val_images": "val", "test_short_side": 64},
        )
        recipe = {"max_steps": 2, "milestones": [], "warmup_steps": 0}
        model = DetectionModule({**SMALL, "score_threshold": 0.0}, shapes.CATEGORIES, recipe, data.evaluation_arguments)
        trainer(use_distributed_sampler=False).validate(model, data, verbose=False)
        return model

    with pytest.raises(UserError, match=r"image 5: '\.\./5\.jpg'.*; 1 annotations whose bbox is not four finite"):
        evaluated("raise")
    model = evaluated("skip")
    assert {found["image_id"] for found in model.metric.results()} == {1, 2, 3, 4} - {unreadable["id"]}
    assert 0 <= model.figures["AP"] <= 1
    assert model.hparams["data"]["on_error"] == "skip"
    assert len([line for line in caplog.messages if "data.on_error=skip" in line]) == 2
