"""The directive ``config-options``: a table of the options of a settings class, from the class itself."""

import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.settings import Settings


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("config-options", ConfigOptions)
    return {"parallel_read_safe": True}


class ConfigOptions(Directive):
    """``config-options:: MODULE.CLASS`` with the name of the config node as its content."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The table."""
        module, _, name = self.arguments[0].rpartition(".")
        kind = getattr(import_module(module), name)
        node = self.content[0].strip() if self.content else ""
        # The docstrings are reStructuredText, and the page is Markdown.
        lines = ["```{eval-rst}", ".. list-table::", "   :header-rows: 1", "   :widths: 24 20 14 42", ""]
        rows = [("option", "allowed", "default", "meaning"), *options(kind, node)]
        for row in rows:
            for column, cell in enumerate(row):
                first, *others = cell.splitlines() or [""]
                lines.append(f"   {'* ' if column == 0 else '  '}- {first}")
                lines += [f"       {other}" for other in others]
        lines.append("```")
        holder = nodes.container()
        self.state.nested_parse(StringList(lines, self.arguments[0]), self.content_offset, holder)
        return [holder]


def options(kind: type[Settings], node: str) -> list[tuple[str, str, str, str]]:
    """Key, allowed values, default and meaning of each field, in reStructuredText."""
    meanings = attributes(kind)
    prefix = f"{node}." if node else ""
    return [
        (
            f"``{prefix}{item.name}``",
            allowed(item.metadata["check"], item.name, item.default),
            "required" if item.default is MISSING else f"``{_plain(item.default)}``",
            f"{meanings[item.name]} *({item.metadata['role']})*",
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
        words = f"a list; each: {items}" if items else "a list"
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


def _plain(value: Any) -> str:
    """A default as in a config file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr([_literal(item) for item in value]) if isinstance(value, tuple) else str(value)


def _literal(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Settings) else value
