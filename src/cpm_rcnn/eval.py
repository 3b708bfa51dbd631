"""``python -m cpm_rcnn.eval ckpt=PATH``: COCO metrics of a checkpoint."""

from omegaconf import DictConfig

from cpm_rcnn.cli.main import run
from cpm_rcnn.cli.nodes import check_ckpt, check_operating_precision
from cpm_rcnn.cli.trainer_options import check_trainer_options
from cpm_rcnn.errors import check_flag


def evaluate(config: DictConfig) -> None:
    """Run one evaluation; its results are written to Hydra's output folder."""
    check_flag("details", config.details)
    check_operating_precision(config)
    check_trainer_options(config)
    check_ckpt(config)
    # Imported after the checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.eval import evaluate_checkpoint

    evaluate_checkpoint(config)


def main() -> None:
    run(evaluate, "eval")


if __name__ == "__main__":
    main()
