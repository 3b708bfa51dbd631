"""Write a detector to a file that runs without this package."""

from pathlib import Path

from omegaconf import DictConfig

from cpm_rcnn.cli.assembly import load_detector
from cpm_rcnn.cli.config import config_keys
from cpm_rcnn.data import ImageSource
from cpm_rcnn.data.problem import counted
from cpm_rcnn.inference.export import export


def export_detector(config: DictConfig, target: Path, source: Path | None, names: list[str]) -> None:
    """Write the detector of ``ckpt`` to ``target``. If there is an error, nothing is written.

    Args:
        config: the config of ``export``.
        target: the file.
        source: the image, or the folder of images, on which detections are compared; None draws images.
        names: the images, relative to ``source`` if it is a folder; otherwise only its name.
    """
    detector, _ = load_detector(config)
    images = None
    if source is not None:
        folder = ImageSource(source if source.is_dir() else source.parent)
        images = {name: folder.read(name) for name in names}
    with config_keys(config, "data"):
        compared = export(detector, target, config.format, images=images, opset=config.opset)
    print(
        f"{counted(compared.detections, 'detection', 'detections')} in {counted(compared.images, 'image', 'images')}; "
        f"largest differences from the model: {compared.box:.2g} pixels, {compared.score:.2g} in scores"
    )
    print(target)
