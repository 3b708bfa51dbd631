"""Plain values of a config, and config keys in error messages."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.errors import ArgumentError, UserError, shown

# All nodes of the commands' configs. Other keys are options.
_NODES = (
    *("backbone", "cmm", "data", "detector", "fusion", "ism", "logger", "multi_scale", "ops", "rsm", "schedule"),
    "trainer",
)
# Examples of keys that must be given.
_EXAMPLES = {
    "ckpt": "outputs/NAME/checkpoints/best.ckpt",
    "source": "FILE_OR_FOLDER",
    "src": "RELEASED.pth",
    "dst": "NEW.ckpt",
    "runs": "[outputs/eval_a,outputs/eval_b]",
}
# The value of an option of ``overrides`` that the user has not given. Null is a value of some options.
UNSET = "unset"
# Nodes whose entries are arguments of something that refuses unknown ones itself.
_CHECKED_NODES = ("backbone", "data", "detector", "hydra", "logger", "trainer")


def check_nodes(config: DictConfig) -> None:
    """Refuse null and plain values in place of nodes.

    Raises:
        UserError: there is such a value.
    """
    for name in _NODES:
        if name in config and not OmegaConf.is_dict(config[name]):
            raise UserError(
                f"{name}={shown(config[name])}: {name} holds options and has no value; set one with {name}.NAME=VALUE"
            )


def check_required(config: DictConfig) -> None:
    """Refuse a config without a key that must be given.

    Raises:
        UserError: keys are missing; it names all of them.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        examples = " ".join(f"{key}={_EXAMPLES.get(key, 'VALUE')}" for key in missing)
        raise UserError(f"{', '.join(missing)}: must be given, for example {examples}")


def check_added_keys(config: DictConfig) -> None:
    """Refuse keys that the user has added with ``+`` and that nothing reads, and keys removed with ``~``.

    Raises:
        UserError: there is such a key.
    """
    hydra = HydraConfig.get()
    # Not resolved: an override may contain an interpolation.
    overrides: Any = OmegaConf.to_container(hydra.overrides.task)
    for override in overrides:
        if override.startswith("~") and not override.startswith("~logger."):
            raise UserError(f"{override}: an option can be changed, not removed")
        if not override.startswith("+"):
            continue
        key = override.lstrip("+").partition("=")[0]
        parent, _, _ = key.rpartition(".")
        if key.partition(".")[0] in _CHECKED_NODES:
            continue
        if key in hydra.runtime.choices:
            raise UserError(f"{key}: head={hydra.runtime.choices.get('head')} has no such group")
        node = OmegaConf.select(config, parent) if parent else config
        if not OmegaConf.is_dict(node):  # reported by check_nodes
            continue
        allowed = sorted(str(name) for name in node if str(name) != key.rpartition(".")[2])
        if not allowed:  # the node was added too
            key, parent = key.partition(".")[0], ""
            allowed = sorted(str(name) for name in config if name != key)
        raise UserError(f"{key}: unknown option; {parent or 'the config'} has {', '.join(allowed)}")


def as_path(value: Any) -> Any:
    """A path that looks like a number, such as a folder named 2017, as a string; other values unchanged."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def to_dict(node: DictConfig) -> dict[str, Any]:
    """A config node as plain values, with interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def overrides_in(node: DictConfig) -> dict[str, Any]:
    """The values that the user has given in a node of ``overrides``; null is such a value."""
    return {key: value for key, value in to_dict(node).items() if value != UNSET}


@contextmanager
def config_keys(config: DictConfig, node: str, renamed: Mapping[str, str] | None = None) -> Iterator[None]:
    """Replace argument names by config keys in errors about arguments that come from ``node``.

    The argument that an error is about is replaced, and all that its message mentions as ``NAME=``.

    Args:
        config: the config.
        node: name of the node.
        renamed: config keys of arguments that do not come from an option of the same name.
    """
    try:
        yield
    except ArgumentError as error:
        key = (renamed or {}).get(error.argument) or config_key(config, node, error.argument)
        raise UserError(f"{key}{with_config_keys(config, node, error.problem)}") from error
    except UserError as error:
        text = with_config_keys(config, node, str(error))
        if text == str(error):
            raise
        raise UserError(text) from error


def with_config_keys(config: DictConfig, node: str, text: str) -> str:
    """A text in which the options of ``node`` that occur as ``NAME=`` are replaced by their config keys."""
    names = "|".join(map(re.escape, map(str, config[node])))
    return re.sub(rf"(?<![\w./])({names})(?==)", lambda match: config_key(config, node, match[1]), text)


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
