"""The options of a config file, which its comments explain."""

import re
from collections.abc import Collection, Iterator
from importlib.resources import files
from typing import Any

import yaml

from cpm_rcnn.cli.config import UNSET

# What only Hydra reads.
_NOT_OPTIONS = ("defaults", "hydra", "_target_")
# The start of a comment that lists the allowed values, "best | last: ...", and the rest of it.
_CHOICES = re.compile(r"((?:[\w-]+ \| )+[\w-]+)(?:[:;] (.*)|(?:,.*)?$)")
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def options(path: str, node: str, omitted: Collection[str] = ()) -> list[tuple[str, str, str, str]]:
    """Key, allowed values, default and meaning of each option in a file of ``conf/``, in reStructuredText.

    Args:
        path: the file, for example ``train.yaml``.
        node: the node that the file is the content of; empty for the config of a command.
        omitted: keys and nodes to leave out.

    Raises:
        ValueError: an option has no comment.
    """
    text = files("cpm_rcnn.conf").joinpath(path).read_text("utf-8")
    lines = text.splitlines()
    rows = []
    for key, value in _entries(yaml.compose(text), f"{node}." if node else "", omitted):
        comment = _comment(lines, value.start_mark.line)
        if not comment:
            raise ValueError(f"conf/{path}: {key} has no comment")
        default = yaml.safe_load(yaml.serialize(value))
        allowed, meaning = _divided(comment, default)
        written = text[value.start_mark.index : value.end_mark.index]
        rows.append((f"``{key}``", allowed, "required" if default == "???" else f"``{written}``", _marked_up(meaning)))
    return rows


def _entries(mapping: yaml.MappingNode, prefix: str, omitted: Collection[str]) -> Iterator[tuple[str, yaml.Node]]:
    for name, value in mapping.value:
        key = f"{prefix}{name.value}"
        if name.value in _NOT_OPTIONS or key in omitted:
            continue
        if isinstance(value, yaml.MappingNode):
            yield from _entries(value, f"{key}.", omitted)
        else:
            yield key, value


def _comment(lines: list[str], number: int) -> str:
    """The comment behind a value and its continuation, or else the one above its line."""
    indent = len(lines[number]) - len(lines[number].lstrip())
    behind = lines[number].partition("  # ")[2]
    found = [behind] if behind else []
    if behind:
        for line in lines[number + 1 :]:
            if not line.lstrip().startswith("#") or len(line) - len(line.lstrip()) <= indent:
                break
            found.append(line.strip())
    else:
        for line in reversed(lines[:number]):
            if not line.startswith(f"{' ' * indent}# "):
                break
            found.insert(0, line.strip())
    return " ".join(line.removeprefix("# ") for line in found)


def _divided(comment: str, default: Any) -> tuple[str, str]:
    """The allowed values, and the meaning."""
    choices = _CHOICES.match(comment)
    if choices:
        return f"one of {choices[1].replace(' | ', ', ')}", choices[2] or comment
    if (example := re.match(r"for example ([\d.]+)", comment)) is not None:
        return f"{_KINDS[type(yaml.safe_load(example[1]))]}, or null", comment
    if default in (None, "???", UNSET) or " | " in comment:
        return "see the meaning", comment
    return _KINDS[type(default)] + (", or null" if "null" in comment else ""), comment


def _marked_up(comment: str) -> str:
    """The comment with links to the documents that it names."""
    escaped = re.sub(r"([\\*`|_])", r"\\\1", comment)
    return re.sub(r"docs/((?:\w|\\_)+)\.md", lambda found: f":doc:`/{found[1]}`".replace("\\_", "_"), escaped)
