"""``python -m cpm_rcnn.convert src=FILE dst=FILE.ckpt``: convert released weights to a checkpoint of this project."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cpm_rcnn.cli.assembly import schedule_settings
from cpm_rcnn.cli.config import as_path, config_keys, overrides_in
from cpm_rcnn.cli.instantiate import instantiate_allowed
from cpm_rcnn.cli.main import run
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from cpm_rcnn.errors import UserError, check_path
from cpm_rcnn.models.build import build
from cpm_rcnn.models.heads.cpm import CPMSettings
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.weights.checkpoints import write_checkpoint
from cpm_rcnn.weights.reading import read_weights
from cpm_rcnn.weights.release import convert_state, release_settings


def convert(config: DictConfig) -> None:
    """Convert ``src`` to ``dst``. If there is an error, nothing is written."""
    target, src = check_path("dst", as_path(config.dst)), as_path(config.src)
    if target.is_dir():
        raise UserError(f"dst={target}: is a folder; give a file in it")
    if target.exists():
        raise UserError(f"dst={target}: exists already; delete it, or give another name")
    state, source = read_weights(src, "src"), f"src={src}"
    with config_keys(config, "detector"):
        settings, num_classes = release_settings(state, source, **overrides_in(config.detector))
    weights = convert_state(state, build(settings, num_classes), source)
    hyper_parameters = {
        "model": settings.to_options(),
        "categories": _categories(config.categories, num_classes, source),
        "schedule": schedule_settings(config).to_dict(),
        "data": instantiate_allowed(config.data, "cpm_rcnn.data.").evaluation_arguments,
    }
    write_checkpoint(target, weights, hyper_parameters)
    millions = sum(value.numel() for value in state.values()) / 1e6
    print(f"{_description(settings, num_classes)}; {millions:.1f} million values")
    if not _is_published(settings):
        print("note: not one of the three published models; check that the file is complete")
    print(target)


def _description(settings: ModelSettings, num_classes: int) -> str:
    head = settings.head
    assert isinstance(head, CPMSettings)
    parts = [f"{len(head.stages)} grid stages"]
    parts += [name.upper() for name in ("ism", "rsm", "fusion") if getattr(head, name)]
    return f"{settings.backbone.name}, {num_classes} classes, {', '.join(parts)}"


def _is_published(settings: ModelSettings) -> bool:
    head = settings.head
    assert isinstance(head, CPMSettings)
    complete = len(head.stages) == 3 and head.ism and head.rsm and head.grid_convs == CPMSettings.grid_convs
    return complete and settings.backbone.name != "resnet"


def _categories(json: str | None, num_classes: int, source: str) -> list[dict[str, Any]]:
    """The classes: COCO's, or those of a COCO-style json."""
    categories = COCO_CATEGORIES if json is None else CocoAnnotations.load(Path(json).expanduser()).categories
    if len(categories) != num_classes:
        origin = "COCO has" if json is None else f"categories={json} has"
        raise UserError(
            f"{source}: has {num_classes} classes, but {origin} {len(categories)}; "
            "give the annotations that the file was trained on as categories=JSON"
        )
    return categories


def main() -> None:
    run(convert, "convert")


if __name__ == "__main__":
    main()
