"""Pages of HTML from the templates in this folder."""

from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cpm_rcnn.reporting.report.charts import defined, percent_text, signed_text
from cpm_rcnn.weights.writing import write_atomically

# Rows of a table that are shown before it is unfolded.
FIRST_ROWS = 20
_FOLDER = Path(__file__).parent


class _Environment(Environment):
    """A template's ``row.count`` is the value of a dict's key, not its method."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return obj[attribute] if isinstance(obj, dict) and attribute in obj else super().getattr(obj, attribute)


def render(template: str, **values: Any) -> str:
    """A page that needs no other file and makes no request.

    Args:
        template: name of a template that extends ``base.html``.
        **values: its variables. ``base.html`` needs ``title``, ``description`` (pairs of label and value),
            ``sections`` and ``short_names`` (names of the sections by their keys), and ``present`` (whether a section
            has content, by key).
    """
    environment = _Environment(
        loader=FileSystemLoader(_FOLDER, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "signed": signed_text, "count": _count}
    environment.tests["known"] = lambda value: isinstance(value, int | float) and defined(value)
    style, script = (Markup((_FOLDER / name).read_text("utf-8")) for name in ("style.css", "script.js"))
    page = environment.get_template(template).render(style=style, script=script, first_rows=FIRST_ROWS, **values)
    return page.strip() + "\n"


def write_page(page: str, path: Path) -> None:
    """Write a page, completely or not at all.

    Raises:
        UserError: the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        file.write(page.encode("utf-8", "replace"))  # json allows names that UTF-8 does not

    write_atomically(path, write)


def _percent(value: float | None, decimals: int = 1) -> str:
    return percent_text(value, decimals)


def _number(value: float | None, decimals: int = 2) -> str:
    return f"{value:.{decimals}f}" if value is not None and defined(value) else "–"


def _count(value: float | None) -> str:
    return f"{int(value):,}" if value is not None and defined(value) else "–"
