"""Instantiation of classes that a config names, if they are in a list of allowed classes."""

from collections.abc import Iterator
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.errors import ArgumentError, UserError, check_choice, shown

# The only classes that a config may instantiate, so that a config from someone else cannot run arbitrary code.
ALLOWED = (
    "cpm_rcnn.data.CocoDataModule",
    "cpm_rcnn.data.ShapesDataModule",
    "pytorch_lightning.Trainer",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.loggers.TensorBoardLogger",
    "pytorch_lightning.loggers.WandbLogger",
)


def instantiate_allowed(node: DictConfig, kind: str = "", /, **arguments: Any) -> Any:
    """An instance of the class that a config node names as ``_target_``.

    Args:
        node: ``_target_``, which is one of :data:`ALLOWED`, and the arguments, which are plain values.
        kind: how the name of the class must start.
        **arguments: further arguments.

    Raises:
        UserError: ``_target_`` is another class, or occurs inside the arguments; or the node has one of ``arguments``.
    """
    targets = list(_class_names(OmegaConf.to_container(node, resolve=True)))
    for target in targets:
        check_choice("_target_", target, [name for name in ALLOWED if name.startswith(kind)])
    if len(targets) != 1 or node.get("_target_") is None:
        raise ArgumentError("_target_", f"={shown(targets)}: there must be exactly one, and none inside the arguments")
    for name in arguments:
        if name in node:
            raise ArgumentError(name, f"={shown(node[name])}: cannot be given, the command sets it")
    try:
        return instantiate(node, **arguments, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _class_names(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from (inner for key, inner in value.items() if key == "_target_")
        yield from (target for inner in value.values() for target in _class_names(inner))
    elif isinstance(value, list):
        yield from (target for inner in value for target in _class_names(inner))
