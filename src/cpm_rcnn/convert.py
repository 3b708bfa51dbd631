"""``python -m cpm_rcnn.convert src=FILE dst=FILE.ckpt``: released weights as a checkpoint of this program."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cpm_rcnn import assembly
from cpm_rcnn.cli.instantiate import make
from cpm_rcnn.cli.main import run
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from cpm_rcnn.errors import UserError, check_path
from cpm_rcnn.weights.checkpoints import write_checkpoint
from cpm_rcnn.weights.files import read_weights
from cpm_rcnn.weights.release import build_release, convert_state, release_arguments


def convert(config: DictConfig) -> None:
    """Read ``src``, write ``dst``; nothing is written where anything is wrong."""
    target = check_path("dst", config.dst)
    if target.is_dir():
        raise UserError(f"dst={target}: is a folder; give a file in it")
    if target.exists():
        raise UserError(f"dst={target}: exists already; delete it, or give another name")
    state, source = read_weights(config.src, "src"), f"src={config.src}"
    model = release_arguments(state, source) | assembly.given(config.detector)
    num_classes = model.pop("num_classes")
    detector = build_release({**model, "num_classes": num_classes}, source)
    weights = convert_state(state, detector, source)
    hyper_parameters = {
        "model": model,
        "categories": _categories(config.categories, num_classes, source),
        "schedule": assembly.recipe(config),
        "data": make(config.data).evaluation_arguments,
    }
    write_checkpoint(target, weights, hyper_parameters)
    parts = [f"{len(model['stages'])} grid stages"] + [name.upper() for name in ("ism", "rsm", "fusion") if model[name]]
    millions = sum(value.numel() for value in state.values()) / 1e6
    print(f"{model['backbone']['name']}, {num_classes} classes, {', '.join(parts)}; {millions:.1f} million values")
    whole = len(model["stages"]) == 3 and model["ism"] and model["rsm"] and model["grid_convs"] == 8
    if not whole or model["backbone"]["name"] == "resnet":
        print("note: none of the three published models; check that the file is all there")
    print(target)


def _categories(json: str | None, num_classes: int, source: str) -> list[dict[str, Any]]:
    """What the classes mean: COCO's, or those of a COCO-style json."""
    categories = COCO_CATEGORIES if json is None else CocoAnnotations.load(Path(json).expanduser()).categories
    if len(categories) != num_classes:
        origin = "COCO has" if json is None else f"categories={json} has"
        raise UserError(
            f"{source}: has {num_classes} classes, but {origin} {len(categories)}; "
            "categories=JSON names them, the annotations that the file was trained on"
        )
    return categories


def main() -> None:
    """The command."""
    run(convert, "convert")


if __name__ == "__main__":
    main()
