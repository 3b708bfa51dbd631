"""The options of a settings class, from the class itself."""

import inspect
import re
import textwrap
from ast import literal_eval
from dataclasses import MISSING, fields
from typing import Any

from cpm_rcnn.errors import ArgumentError, shown
from cpm_rcnn.settings import Settings


def options(kind: type[Settings], node: str) -> list[tuple[str, str, str, str]]:
    """Key, allowed values, default and meaning of each field, in reStructuredText."""
    meanings = attributes(kind)
    prefix = f"{node}." if node else ""
    return [
        (
            f"``{prefix}{item.name}``",
            allowed(item.metadata["check"], item.name, item.default),
            "required" if item.default is MISSING else f"``{shown(_plain(item.default))}``",
            f"{_as_in_configs(meanings[item.name])} *({item.metadata['role']})*",
        )
        for item in fields(kind)
    ]


def attributes(kind: type) -> dict[str, str]:
    """The texts of the section ``Attributes`` of a class and its bases by name, in one line each."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for entry in re.split(r"\n(?=\S)", textwrap.dedent(section)):
            name, colon, text = entry.partition(":")
            if colon and name.isidentifier():
                found[name] = " ".join(text.split())
    return found


def allowed(check: Any, name: str, default: Any) -> str:
    """What a check accepts, in the words of its own error message."""
    words = _refusal(check, name, object())
    if words.startswith("a list"):
        items = _refusal(check, name, [object()])
        # A list of a fixed length says so itself.
        words = items if items.startswith("a list of") else f"a list; each: {items}" if items else "a list"
    try:
        check(name, None)
        null = default is not MISSING
    except Exception:
        null = False
    return (words or "see the meaning") + (", or null" if null and "null" not in words else "")


def _refusal(check: Any, name: str, wrong: Any) -> str:
    """What must be given instead of a wrong value."""
    try:
        check(name, wrong)
    except ArgumentError as error:
        return error.problem.partition("must be ")[2]
    except Exception:  # a check that looks into a value of the right type
        return ""
    return ""


def _as_in_configs(text: str) -> str:
    """A text of a docstring with values as configs write them."""
    return re.sub(r"(?<![\w`.])(None|True|False)(?![\w`])", lambda found: f"``{shown(literal_eval(found[0]))}``", text)


def _plain(value: Any) -> Any:
    """A default without settings classes."""
    if isinstance(value, Settings):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
