"""``python -m cpm_rcnn.eval ckpt=PATH``: COCO metrics of a checkpoint."""

from omegaconf import DictConfig

from cpm_rcnn.cli.main import run
from cpm_rcnn.errors import check_flag


def evaluate(config: DictConfig) -> None:
    """Run one evaluation; its results are written to Hydra's output folder."""
    check_flag("details", config.details)
    # Imported after the checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.eval import evaluate_checkpoint

    evaluate_checkpoint(config)


def main() -> None:
    run(evaluate, "eval")


if __name__ == "__main__":
    main()
