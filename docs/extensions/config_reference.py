"""The directives ``config-options`` and ``yaml-options``: tables of options, made from the code and from ``conf/``."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any, ClassVar

import settings_options
import yaml_options
from docutils import nodes
from docutils.parsers.rst import Directive, directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from cpm_rcnn.settings import Settings


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("config-options", ConfigOptions)
    app.add_directive("yaml-options", YamlOptions)
    return {"parallel_read_safe": True}


class ConfigOptions(Directive):
    """``config-options:: MODULE.CLASS`` with the name of the config node as its content.

    ``:without:`` is a base class whose options are left out, unless their default differs.
    """

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {"without": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """The table."""
        base = self.options.get("without")
        omitted = settings_options.options(_class(base), self.content[0]) if base else []
        rows = settings_options.options(_class(self.arguments[0]), self.content[0])
        known = {(row[0], row[2]) for row in omitted}
        return _table(self, [row for row in rows if (row[0], row[2]) not in known])


class YamlOptions(Directive):
    """``yaml-options:: FILE`` of ``conf/``, with the name of the config node as its content, if it has one.

    ``:without:`` lists keys and nodes that are left out.
    """

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {"without": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """The table."""
        node = self.content[0] if self.content else ""
        return _table(self, yaml_options.options(self.arguments[0], node, self.options.get("without", "").split()))


def _class(name: str) -> type[Settings]:
    module, _, kind = name.rpartition(".")
    return getattr(import_module(module), kind)


def _table(directive: Directive, rows: Iterable[tuple[str, ...]]) -> list[nodes.Node]:
    """A table of rows whose cells are reStructuredText; the page is Markdown."""
    lines = [
        "```{eval-rst}",
        ".. list-table::",
        "   :class: options",
        "   :header-rows: 1",
        "   :widths: 24 20 14 42",
        "",
    ]
    for row in [("option", "allowed", "default", "meaning"), *rows]:
        for column, cell in enumerate(row):
            first, *others = cell.splitlines() or [""]
            lines.append(f"   {'* ' if column == 0 else '  '}- {first}")
            lines += [f"       {other}" for other in others]
    lines.append("```")
    holder = nodes.container()
    directive.state.nested_parse(StringList(lines, directive.arguments[0]), directive.content_offset, holder)
    return [holder]
