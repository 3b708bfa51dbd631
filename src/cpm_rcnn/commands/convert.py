"""Convert another program's detector to a checkpoint."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cpm_rcnn.cli.config import as_path, config_keys, overrides_in, to_dict
from cpm_rcnn.cli.instantiate import instantiate_allowed
from cpm_rcnn.cli.nodes import schedule_settings
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from cpm_rcnn.errors import UserError
from cpm_rcnn.weights.checkpoints import write_checkpoint
from cpm_rcnn.weights.detector_files import ConvertedDetector
from cpm_rcnn.weights.detectors import convert_file


def convert_detector(config: DictConfig, target: Path) -> None:
    """Convert ``src`` to the checkpoint ``target``. If there is an error, nothing is written."""
    src = as_path(config.src)
    backbone = {name: value for name, value in to_dict(config.backbone).items() if value is not None}
    with config_keys(config, "detector"):
        converted = convert_file(src, "src", **backbone, **overrides_in(config.detector))
    hyper_parameters = {
        "model": converted.settings.to_options(),
        "categories": _categories(config.categories, converted, f"src={src}"),
        "schedule": schedule_settings(config).to_dict(),
        "data": instantiate_allowed(config.data, "cpm_rcnn.data.").evaluation_arguments,
    }
    write_checkpoint(target, converted.state, hyper_parameters)
    print(f"{converted.description}; {converted.num_values / 1e6:.1f} million values")
    for note in converted.notes:
        print(f"note: {note}")
    print(target)


def _categories(json: str | None, converted: ConvertedDetector, source: str) -> list[dict[str, Any]]:
    """The classes: those of a COCO-style json, or those that the file names, or COCO's."""
    if json is None:
        categories, origin = converted.categories or COCO_CATEGORIES, "COCO has"
    else:
        categories, origin = CocoAnnotations.load(Path(json).expanduser()).categories, f"categories={json} has"
    if len(categories) != converted.num_classes:
        raise UserError(
            f"{source}: has {converted.num_classes} classes, but {origin} {len(categories)}; "
            "give the annotations that the file was trained on as categories=JSON"
        )
    return categories
