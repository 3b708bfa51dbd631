"""``python -m cpm_rcnn.train``: train a model, evaluate its best checkpoint, leave pictures and tables."""

from pathlib import Path

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn import assembly
from cpm_rcnn.commands import run
from cpm_rcnn.reporting.curves import plot_curves
from cpm_rcnn.reporting.tables import print_metrics, write_metrics
from cpm_rcnn.reporting.validation_sheet import validation_sheet


def train(config: DictConfig) -> None:
    """One training run into Hydra's output folder."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    datamodule = assembly.build_datamodule(config)
    module = assembly.build_module(config, datamodule.categories)
    trainer = assembly.build_trainer(config, run_dir)
    if trainer.is_global_zero:
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    trainer.fit(module, datamodule=datamodule)
    # A rehearsal (fast_dev_run) leaves no checkpoint to go back to.
    best = None if config.trainer.fast_dev_run else "best"
    trainer.validate(module, datamodule=datamodule, ckpt_path=best, verbose=False, weights_only=True)
    if not trainer.is_global_zero:
        return
    write_metrics(module.figures, run_dir / "metrics.json")
    if not config.trainer.fast_dev_run:
        plot_curves(run_dir / "metrics.csv", run_dir)
    validation_sheet(
        module.eval(),
        datamodule.val_dataloader().dataset,
        module.class_names,
        run_dir / "validation.png",
        config.sheet_images,
        module.device,
    )
    print_metrics(module.figures)
    print(run_dir)


def main() -> None:
    """The command."""
    run(train, "train")


if __name__ == "__main__":
    main()
