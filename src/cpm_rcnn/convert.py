"""``python -m cpm_rcnn.convert src=FILE dst=FILE.ckpt``: convert another program's detector to a checkpoint."""

from omegaconf import DictConfig

from cpm_rcnn.cli.config import as_path
from cpm_rcnn.cli.main import run
from cpm_rcnn.errors import UserError, check_path


def convert(config: DictConfig) -> None:
    """Convert ``src`` to ``dst``. If there is an error, nothing is written."""
    target = check_path("dst", as_path(config.dst))
    if target.is_dir():
        raise UserError(f"dst={target}: is a folder; give a file in it")
    if target.exists():
        raise UserError(f"dst={target}: exists already; delete it, or give another name")
    # Imported after the checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.convert import convert_detector

    convert_detector(config, target)


def main() -> None:
    run(convert, "convert")


if __name__ == "__main__":
    main()
