"""What a config can make."""

from collections.abc import Iterator
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.errors import UserError, check_choice

# All that a config can name: a file from someone else composes, but runs nothing.
TARGETS = (
    "cpm_rcnn.data.CocoDataModule",
    "cpm_rcnn.data.ShapesDataModule",
    "pytorch_lightning.Trainer",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.loggers.TensorBoardLogger",
    "pytorch_lightning.loggers.WandbLogger",
)


def make(node: DictConfig, **arguments: Any) -> Any:
    """What a config node with ``_target_`` describes.

    Args:
        node: ``_target_``, one of :data:`TARGETS`, and its arguments, plain values.
        **arguments: more of them.

    Raises:
        UserError: another target, also in its depth.
    """
    targets = list(_targets(OmegaConf.to_container(node, resolve=True)))
    for target in targets:
        check_choice("_target_", target, TARGETS)
    if len(targets) != 1 or node.get("_target_") is None:
        raise UserError(f"_target_={targets}: one is needed, and none within its arguments")
    return instantiate(node, **arguments, _convert_="all")


def _targets(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from (inner for key, inner in value.items() if key == "_target_")
        yield from (target for inner in value.values() for target in _targets(inner))
    elif isinstance(value, list):
        yield from (target for inner in value for target in _targets(inner))
