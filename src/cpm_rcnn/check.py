"""``python -m cpm_rcnn.check``: check the annotations and images of a data set before a training."""

from omegaconf import DictConfig

from cpm_rcnn.cli.main import run
from cpm_rcnn.cli.nodes import check_data_settings, provisional, schedule_settings


def check(config: DictConfig) -> None:
    """Check a data set; the results are written to Hydra's output folder."""
    schedule_settings(provisional(config))
    check_data_settings(provisional(config))
    # Imported after these checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.check import check_data

    check_data(config)


def main() -> None:
    run(check, "check")


if __name__ == "__main__":
    main()
