"""A warning for each option of a command that the page of the options does not have."""

from collections.abc import Iterator
from typing import Any

from docutils import nodes
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

from cpm_rcnn.console import COMMANDS

_PAGE = "reference/options"
# Commands with choices that together have all options.
_CONFIGS = [
    *((name, []) for name in COMMANDS),
    ("train", ["head=faster", "data=custom"]),
    ("train", ["head=cascade", "data=shapes"]),
    ("eval", ["multi_scale=on"]),
]
# Arguments of Lightning's loggers, and the class of a node.
_NOT_OPTIONS = ("logger", "_target_")


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("doctree-resolved", _check)
    return {"parallel_read_safe": True}


def _check(app: Sphinx, doctree: nodes.document, page: str) -> None:
    if page != _PAGE:
        return
    named = {literal.astext() for literal in doctree.findall(nodes.literal)}
    for key in sorted(_keys() - named):
        getLogger(__name__).warning("the option %s is missing", key, location=page)


def _keys() -> set[str]:
    with initialize_config_module("cpm_rcnn.conf", version_base="1.3"):
        configs = [compose(name, overrides) for name, overrides in _CONFIGS]
    return {key for config in configs for key in _leaves(OmegaConf.to_container(config, resolve=False))}


def _leaves(content: Any, prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        if name in _NOT_OPTIONS:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
