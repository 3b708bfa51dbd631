"""Train from Python, with callbacks and a logger of one's own."""

import sys
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

import cpm_rcnn
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.weights.initialize import initialize


class PrintLosses(pl.Callback):
    """A callback of one's own: the losses of every fifth step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % 5 == 0:
            print(trainer.global_step, {name: round(float(loss), 3) for name, loss in module.losses.items()})


def train(root: Path, folder: Path, steps: int = 200) -> Path:
    """Train a small detector on a data set in any of the known formats; returns the best checkpoint."""
    pl.seed_everything(0)
    sizes = {"short_sides": [192], "max_size": 256, "test_short_side": 192, "test_max_size": 256}
    data = CocoDataModule(root=str(root), batch_size=2, max_steps=steps, num_workers=0, **sizes)
    widths = {"fpn_channels": 48, "mlp_channels": 128, "point_channels": 8, "grid_convs": 2}
    samples = {"samples": 64, "max_grid_rois": 24, "proposals_train": 300, "proposals_test": 100}
    module = DetectionModule(
        # The options of cpm_rcnn.build_detector.
        model={"backbone": "tiny", **widths, **samples},
        categories=data.categories,
        # The options of the schedule; AdamW with a rate for 16 images per step.
        schedule={"max_steps": steps, "milestones": [], "optimizer": "adamw", "base_lr": 3e-3, "warmup_steps": 10},
        data=data.evaluation_arguments,
    )
    # Constructors read no files: starting weights are read here, those of an ImageNet backbone or of a detector.
    initialize(module.model)
    best = ModelCheckpoint(folder, "best", monitor="val/AP", mode="max")
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=steps,
        callbacks=[best, PrintLosses()],
        logger=CSVLogger(folder),
        log_every_n_steps=5,
        use_distributed_sampler=False,  # the data module distributes the images itself
        accelerator="auto",
        devices=1,
    )
    trainer.fit(module, datamodule=data)
    return Path(best.best_model_path)


if __name__ == "__main__":
    root, folder = map(Path, sys.argv[1:3])
    checkpoint = train(root, folder, *map(int, sys.argv[3:4]))
    detector = cpm_rcnn.load(checkpoint)
    image = next(path for path in sorted(root.rglob("*")) if path.suffix in (".jpg", ".png"))
    (found,) = detector.detect([image], score_threshold=0.3)
    print(checkpoint, image.name, list(zip(found.names, found.scores.tolist())))
