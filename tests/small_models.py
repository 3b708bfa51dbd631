"""Small models, data and trainers for tests of training, weights and inference."""

import json

import pytorch_lightning as pl
import torch

from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.data.shapes import CATEGORIES as SHAPES_CATEGORIES
from cpm_rcnn.training.module import DetectionModule

SMALL = {
    "backbone": {"name": "tiny"},
    "fpn_channels": 16,
    "mlp_channels": 16,
    "point_channels": 4,
    "grid_convs": 1,
    "convention": "continuous",
    "proposals_test": 20,
    "score_threshold": 0.0,
}
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
SIZES = {"test_short_side": 64, "test_max_size": 96}


def small_module(categories=CATEGORIES, data=SIZES, schedule=None, **model):
    """A detection module with random weights that are the same at every call."""
    torch.manual_seed(0)
    recipe = {"max_steps": 2, "milestones": [], "warmup_steps": 0, "images_per_device": 2, **(schedule or {})}
    return DetectionModule(model={**SMALL, **model}, categories=categories, schedule=recipe, data=data)


def small_trainer(**options):
    """A trainer on the CPU for two steps that prints and writes nothing."""
    defaults = {
        "accelerator": "cpu",
        "max_steps": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**{**defaults, **options})


class TwoImages(pl.LightningDataModule):
    """Two equal images per step, with one object each."""

    batch_size = 2

    def train_dataloader(self):
        image = torch.full((3, 64, 64), 90, dtype=torch.uint8)
        target = {"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([2])}
        batch = ([image, image], [target, target])
        return torch.utils.data.DataLoader([batch, batch], batch_size=None)


def shapes_data(root, **options):
    """The data module of shapes that ``write_shapes`` rendered into ``root``."""
    defaults = {
        "root": str(root),
        "categories": SHAPES_CATEGORIES,
        "train_json": "annotations/instances_train.json",
        "train_images": "train",
        "val_json": "annotations/instances_val.json",
        "val_images": "val",
        "num_workers": 0,
        "short_sides": [64],
        "max_size": 96,
        "batch_size": 2,
        **SIZES,
    }
    return CocoDataModule(**{**defaults, **options})


def write_trained(path, module=None):
    """Train ``module`` for two steps and write a checkpoint of the run; returns the module."""
    module = small_module() if module is None else module
    trainer = small_trainer()
    trainer.fit(module, datamodule=TwoImages())
    trainer.save_checkpoint(path)
    return module.eval()


def change_checkpoint(path, target, **hyper_parameters):
    """Copy a checkpoint with other hyperparameters; those that are ``...`` are removed."""
    checkpoint = torch.load(path, weights_only=True)
    stored = {**checkpoint["hyper_parameters"], **hyper_parameters}
    checkpoint["hyper_parameters"] = {name: value for name, value in stored.items() if value is not ...}
    torch.save(checkpoint, target)
    return target


def same_values(a, b):
    """Whether two state dicts have the same names and bit-equal values."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_plain(value):
    """Whether JSON represents ``value`` without loss."""
    return json.loads(json.dumps(value)) == value
