"""Write a detector to a file that runs without this package."""

from pathlib import Path

from omegaconf import DictConfig

from cpm_rcnn.cli.assembly import load_detector
from cpm_rcnn.cli.config import config_keys
from cpm_rcnn.data import ImageSource
from cpm_rcnn.data.problem import counted
from cpm_rcnn.inference.export import export


def export_detector(config: DictConfig, target: Path, source: tuple[Path, list[str]] | None) -> None:
    """Write the detector of ``ckpt`` to ``target``. If there is an error, nothing is written.

    Args:
        config: the config of ``export``.
        target: the file.
        source: the images on which detections are compared, a folder and their names in it; None draws images.
    """
    detector, _ = load_detector(config)
    images = None
    if source is not None:
        folder, names = source
        reader = ImageSource(folder)
        images = {name: reader.read(name) for name in names}
    with config_keys(config, "data"):
        compared = export(detector, target, config.format, images=images, opset=config.opset)
    print(
        f"{counted(compared.detections, 'detection', 'detections')} in {counted(compared.images, 'image', 'images')}; "
        f"largest differences from the model: {compared.box:.2g} pixels, {compared.score:.2g} in scores"
    )
    print(target)
