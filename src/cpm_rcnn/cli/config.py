"""Plain values of a config, and config keys in error messages."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.errors import ArgumentError, UserError

# Nodes whose entries are arguments of something that refuses unknown ones itself.
_CHECKED_NODES = ("backbone", "data", "detector", "hydra", "logger", "trainer")


def check_added_keys(config: DictConfig) -> None:
    """Refuse keys that the user has added with ``+`` and that nothing reads.

    Raises:
        UserError: there is such a key.
    """
    hydra = HydraConfig.get()
    for override in hydra.overrides.task:
        if not override.startswith("+"):
            continue
        key = override.lstrip("+").partition("=")[0]
        parent, _, _ = key.rpartition(".")
        if key.partition(".")[0] in _CHECKED_NODES:
            continue
        if key in hydra.runtime.choices:
            raise UserError(f"{key}: this command or the chosen head has no such group")
        node = config.get(parent, config) if parent else config
        allowed = sorted(str(name) for name in node if str(name) != key.rpartition(".")[2])
        raise UserError(f"{key}: unknown option; {parent or 'the config'} has {', '.join(allowed)}")


def as_path(value: Any) -> Any:
    """A path that looks like a number, such as a folder named 2017, as a string; other values unchanged."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def to_dict(node: DictConfig) -> dict[str, Any]:
    """A config node as plain values, with interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def non_null(node: DictConfig) -> dict[str, Any]:
    """The values of a config node that are not null."""
    return {key: value for key, value in to_dict(node).items() if value is not None}


@contextmanager
def config_keys(config: DictConfig, node: str) -> Iterator[None]:
    """Replace argument names by config keys in errors about arguments that come from ``node``."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(f"{config_key(config, node, error.argument)}{error.problem}") from error


def config_key(config: DictConfig, node: str, argument: str) -> str:
    """The config key that an argument's value comes from.

    Args:
        config: the config.
        node: name of the node whose entries were the arguments.
        argument: for example ``nms_iou``, ``stages[0].loss_weight``, or ``backbone.name``, whose node is ``backbone``.

    Returns:
        For example ``detector.nms_iou``; ``cmm.stages[0].loss_weight``, because ``detector.stages`` refers to
        ``cmm.stages``; ``backbone.name``.
    """
    first = re.match(r"\w*", argument)[0]  # type: ignore[index]
    if first not in config[node]:
        if first in config:
            return argument
        owners = (name for name in config if OmegaConf.is_dict(config._get_node(name)) and first in config[name])
        node = str(next(owners, node))
    raw = config[node]._get_node(first)._value() if first in config[node] else None
    if isinstance(raw, str) and (reference := re.fullmatch(r"\$\{([\w.]+)\}", raw)):
        return reference[1] + argument[len(first) :]
    return f"{node}.{argument}"
