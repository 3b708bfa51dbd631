"""AP on large images with small objects: whole images against tiles, after the same CPU time of training.

    python benchmarks/tiles.py

The images are 2048 x 2048 pixels, with 40 colored circles, squares and triangles of 8 to 12 pixels each, on smooth
backgrounds. All models have the backbone, the head and the optimizer of ``experiment=quickstart`` and anchors from the
size of the objects on, and start from random weights. The number of steps is the time of training divided by that of a
step, which is measured first. AP is COCO's on whole images; those of the validation are others than those of the
training.
"""

import argparse
import colorsys
import json
import logging
import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.training.module import DetectionModule

SIDE = 2048
OBJECTS = 40
CLASSES = ("circle", "square", "triangle")
SCALE = 8  # objects are drawn larger by this factor and averaged, which smooths their edges
MEASURED = 4  # steps that are timed


class Kind(NamedTuple):
    """How a model sees the images.

    Attributes:
        name: a description.
        tile: side of the tiles in pixels; None for whole images.
        short_side: side in pixels to which images or tiles are resized.
        batch: images or tiles per step.
    """

    name: str
    tile: int | None
    short_side: int
    batch: int

    @property
    def object_side(self) -> float:
        """Side of a medium object in pixels, as the network sees it."""
        return 10 * self.short_side / (self.tile or SIDE)


KINDS = (
    Kind("whole images, resized to 512", None, 512, 1),
    Kind("whole images, 2048", None, SIDE, 1),
    Kind("tiles of 256", 256, 256, 4),
)


def write_split(root: Path, split: str, count: int, rng: np.random.Generator) -> None:
    """Draw the images of a split and write their annotations in COCO's format."""
    (root / split).mkdir(parents=True)
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES, start=1)],
    }
    for number in range(1, count + 1):
        clouds = Image.fromarray(rng.integers(60, 190, (12, 12, 3), dtype=np.uint8))
        image = clouds.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        # One object per cell of a grid, so that none covers another.
        columns = 16
        for cell in rng.choice(columns**2, OBJECTS, replace=False).tolist():
            kind, side = int(rng.integers(len(CLASSES))), int(rng.integers(8, 13))
            space = SIDE // columns - side
            x, y = (SIDE // columns * place + int(rng.integers(space)) for place in (cell % columns, cell // columns))
            draw(image, kind, (x, y, side), rng)
            entry = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": kind + 1}
            content["annotations"].append(entry | {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0})
        image.save(root / split / f"{number}.jpg", quality=95)
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": SIDE, "width": SIDE})
    (root / f"{split}.json").write_text(json.dumps(content))


def draw(image: Image.Image, kind: int, place: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Draw an object of a class that fills the square ``place`` (x, y, side) of an image."""
    x, y, side = place
    hue = (kind + rng.uniform(-0.3, 0.3)) / len(CLASSES)
    color = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.7, 1), rng.uniform(0.7, 1)))
    mask = Image.new("L", (side * SCALE, side * SCALE))
    last = side * SCALE - 1
    outlines = {
        "circle": lambda pen: pen.ellipse((0, 0, last, last), fill=255),
        "square": lambda pen: pen.rectangle((0, 0, last, last), fill=255),
        "triangle": lambda pen: pen.polygon([(0, last), (last // 2, 0), (last, last)], fill=255),
    }
    outlines[CLASSES[kind]](ImageDraw.Draw(mask))
    image.paste(color, (x, y), mask.reduce(SCALE))


def fit(kind: Kind, root: Path, seed: int, steps: int) -> tuple[DetectionModule, CocoDataModule, float]:
    """Train a model; returns it with its data and the CPU time of the steps in seconds."""
    pl.seed_everything(seed, verbose=False)
    data = CocoDataModule(
        root=str(root),
        train_json="train.json",
        train_images="train",
        val_json="val.json",
        val_images="val",
        batch_size=kind.batch,
        max_steps=steps,
        seed=seed,
        num_workers=0,
        tile=kind.tile,
        short_sides=[kind.short_side],
        max_size=kind.short_side,
        test_short_side=kind.short_side,
        test_max_size=kind.short_side,
    )
    module = DetectionModule(
        model={
            "backbone": {"name": "tiny"},
            "fpn_channels": 48,
            "mlp_channels": 256,
            "point_channels": 8,
            "grid_convs": 4,
            "samples": 64,
            "max_grid_rois": 12,
            "anchor_sizes": [kind.object_side * 2**level for level in range(5)],
            "ignore_border_anchors": False,
            "proposals_train": 500,
            "proposals_test": 300,
        },
        categories=data.categories,
        schedule={
            "max_steps": steps,
            "milestones": [math.ceil(0.77 * steps), math.ceil(0.92 * steps)],
            "optimizer": "adamw",
            "base_lr": 0.0032 * 4 / kind.batch,  # the learning rate is that of quickstart, whatever the batch
            "warmup_steps": steps // 20,
            "weight_decay": 0.01,
            "bias_lr_factor": 1.0,
        },
        data=data.evaluation_arguments,
    )
    timer = StepTimer()
    trainer(timer, max_steps=steps, limit_val_batches=0, gradient_clip_val=10.0).fit(module, data)
    return module, data, timer.seconds


class StepTimer(pl.Callback):
    """Measures the CPU time from the end of the first step to the end of the last, and adds that of a mean step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> float:
        """The CPU time of all steps."""
        return (self.ends[-1] - self.ends[0]) * len(self.ends) / (len(self.ends) - 1)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A trainer on the CPU that prints and writes nothing."""
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )


def main() -> None:
    """Train all models on each seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="CPU time of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--train", type=int, default=16, help="number of training images")
    parser.add_argument("--val", type=int, default=4, help="number of validation images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

    table = Table(title=f"{SIDE} x {SIDE} pixels, {OBJECTS} objects of 8 to 12 pixels per image; seeds {options.seeds}")
    table.add_column("input")
    for name in ("object at the network", "steps", "CPU seconds", "AP", "AP50", "CPU seconds per test image"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for k, (split, count) in enumerate((("train", options.train), ("val", options.val))):
            write_split(root, split, count, np.random.default_rng(k))
        for kind in KINDS:
            *_, measured = fit(kind, root, 0, MEASURED)
            steps = max(2, round(options.seconds * MEASURED / measured))
            runs = []
            for seed in options.seeds:
                module, data, seconds = fit(kind, root, seed, steps)
                begun = time.process_time()
                trainer().validate(module, data, verbose=False)
                test = (time.process_time() - begun) / options.val
                runs.append((seconds, module.metrics["AP"], module.metrics["AP50"], test))
                print(kind.name, "seed", seed, [round(value, 4) for value in runs[-1]], flush=True)
            times, *metrics, tests = zip(*runs)
            percent = [", ".join(f"{100 * value:.1f}" for value in values) for values in metrics]
            side, means = f"{kind.object_side:.1f} px", [np.mean(values) for values in (times, tests)]
            table.add_row(kind.name, side, str(steps), f"{means[0]:.0f}", *percent, f"{means[1]:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
