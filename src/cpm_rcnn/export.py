"""``python -m cpm_rcnn.export ckpt=PATH``: write a detector to a file that runs without this package."""

from pathlib import Path

from omegaconf import DictConfig

from cpm_rcnn.cli.config import as_path
from cpm_rcnn.cli.main import run
from cpm_rcnn.cli.nodes import check_ckpt
from cpm_rcnn.data.sources import find_images
from cpm_rcnn.errors import UserError, check_choice, check_count, check_path

# As in cpm_rcnn.inference.export, which imports torch.
_FORMATS = ("onnx", "pt2")
_MIN_OPSET = 19


def export(config: DictConfig) -> None:
    """Write the detector of ``ckpt`` to ``dst``. If there is an error, nothing is written."""
    check_choice("format", config.format, _FORMATS)
    check_count("opset", config.opset, _MIN_OPSET)
    target = check_path("dst", as_path(config.dst))
    if target.is_dir():
        raise UserError(f"dst={target}: is a folder; give a file in it")
    if target.exists():
        raise UserError(f"dst={target}: exists already; delete it, or give another name")
    if target.suffix != f".{config.format}":
        raise UserError(f"dst={target}: with format={config.format} the name must end in .{config.format}")
    images: tuple[Path, list[str]] | None = None
    if config.source is not None:
        images = find_images(check_path("source", as_path(config.source)))
    check_ckpt(config)
    # Imported after the checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.export import export_detector

    export_detector(config, target, images)


def main() -> None:
    run(export, "export")


if __name__ == "__main__":
    main()
