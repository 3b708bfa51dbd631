"""``python -m cpm_rcnn.train``: train a model, evaluate its best and its last checkpoint, write plots and tables."""

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cpm_rcnn.cli.main import run
from cpm_rcnn.cli.nodes import check_data_settings, check_operating_precision, provisional, schedule_settings
from cpm_rcnn.cli.sweep import run_cell
from cpm_rcnn.cli.trainer_options import check_trainer_options
from cpm_rcnn.errors import UserError, check_choice, check_count, check_flag


def train(config: DictConfig) -> float | None:
    """Run one training; its results are written to Hydra's output folder.

    Returns:
        The AP of a cell of a sweep; None if it has none, and for a single training.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_cell(config)
    check_count("sheet_images", config.sheet_images, 0)
    check_count("seed", config.seed, 0, 2**32 - 1)
    check_flag("overwrite", config.overwrite)
    check_choice("select", config.select, ("best", "last"))
    if config.init is not None and config.resume not in (None, False, "auto", True):
        raise UserError("init and resume: give only one of them; a resumed run has its weights already")
    check_choice("init_stages", config.init_stages, ("own", "repeat"))
    check_choice("resume_changes", config.resume_changes, ("refuse", "allow"))
    schedule_settings(provisional(config))
    check_data_settings(provisional(config))
    check_operating_precision(config)
    check_trainer_options(config)
    # Imported after these checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.train import train_model

    train_model(config)
    return None


def main() -> None:
    run(train, "train")


if __name__ == "__main__":
    main()
