"""A comparison of evaluations on the terminal, as JSON and as a page of HTML without external files."""

import html
import math
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpm_rcnn.reporting.tables import percent, write_metrics
from cpm_rcnn.weights.writing import write_atomically

JSON, HTML = "comparison.json", "comparison.html"

_WIDTH, _HEIGHT = 160, 18  # pixels of a drawn interval
_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 .75rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.clear { font-weight: bold; }
svg { display: block; }
"""


def comparison_tables(comparison: dict[str, Any]) -> list[Table]:
    """The metrics of all runs, and their APs per class, in percent.

    Args:
        comparison: ``images``, ``samples``, ``confidence`` and ``runs``. A run is a dict of ``name`` and of what
            :func:`~cpm_rcnn.evaluation.bootstrap.compare_matches` returns. Undefined values are shown as a dash.
            Differences whose interval does not contain 0 are bold.
    """
    tables = []
    for key, title in (("metrics", _caption(comparison)), ("per_class", "AP per class")):
        table = Table(title=title, title_justify="left")
        for number, heading in enumerate(_headings(key)):
            table.add_column(heading, justify="left" if number < 2 else "right", overflow="fold")
        for metric, rows in _rows(comparison, key):
            for number, (name, result) in enumerate(rows):
                difference = result.get("difference")
                clear = difference is not None and _is_clear(difference)
                table.add_row(
                    escape(metric) if number == 0 else "",
                    escape(name),
                    percent(result["value"]),
                    _range(result),
                    "" if difference is None else f"[bold]{_signed(difference)}" if clear else _signed(difference),
                    "" if difference is None else _range(difference, signed=True),
                    end_section=number == len(rows) - 1,
                )
        tables.append(table)
    return tables


def print_comparison(comparison: dict[str, Any], console: Console | None = None) -> None:
    """Print :func:`comparison_tables` to ``console``, by default the terminal."""
    console = console or Console()
    for table in comparison_tables(comparison):
        console.print(table)


def write_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """Write ``comparison.json``, where undefined values are null, and ``comparison.html`` to a folder.

    Raises:
        UserError: a file cannot be written.
    """
    write_metrics(comparison, folder / JSON)

    def write(file: BinaryIO) -> None:
        file.write(comparison_page(comparison).encode("utf-8"))

    write_atomically(folder / HTML, write)


def comparison_page(comparison: dict[str, Any]) -> str:
    """The comparison as a page of HTML, with one drawing per interval of a difference; it needs no other file."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Comparison of {len(comparison['runs'])} evaluations</title><style>{_STYLE}</style></head><body>",
        f"<h1>Comparison of {len(comparison['runs'])} evaluations</h1>",
        f"<p>{html.escape(_caption(comparison))}. Annotations: {html.escape(str(comparison['annotations']))}.</p>",
        f"<p>Differences are to {html.escape(comparison['runs'][0]['name'])}. They are bold if the interval does not "
        "contain 0. The vertical line of a drawing is 0; all drawings of a table have the same scale.</p>",
    ]
    for key, title in (("metrics", "Metrics"), ("per_class", "AP per class")):
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in [*_headings(key), ""])
        parts.append(f"<h2>{title}</h2><div><table><thead><tr>{head}</tr></thead><tbody>")
        scale = _scale(comparison, key)
        for metric, rows in _rows(comparison, key):
            for number, (name, result) in enumerate(rows):
                cells = [metric if number == 0 else "", name, percent(result["value"]), _range(result)]
                row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
                if (difference := result.get("difference")) is None:
                    row += "<td></td>" * 3
                else:
                    style = ' class="clear"' if _is_clear(difference) else ""
                    row += f"<td{style}>{_signed(difference)}</td><td>{_range(difference, signed=True)}</td>"
                    row += f"<td>{_drawing(difference, scale)}</td>"
                parts.append(f"<tr>{row}</tr>")
        parts.append("</tbody></table></div>")
    return "\n".join([*parts, "</body></html>", ""])


def _caption(comparison: dict[str, Any]) -> str:
    return (
        f"COCO metrics in percent, {comparison['images']} images; {100 * comparison['confidence']:g} % intervals of "
        f"{comparison['samples']} resamples of the images"
    )


def _headings(key: str) -> list[str]:
    first, value = ("metric", "value") if key == "metrics" else ("class", "AP")
    return [first, "run", value, "interval", "difference", "its interval"]


def _rows(comparison: dict[str, Any], key: str) -> list[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Per metric or class, the name and the result of each run."""
    runs = comparison["runs"]
    return [(metric, [(run["name"], run[key][metric]) for run in runs]) for metric in runs[0][key]]


def _is_clear(difference: dict[str, float]) -> bool:
    """Whether the interval does not contain 0."""
    return difference["low"] > 0 or difference["high"] < 0


def _range(result: dict[str, float], signed: bool = False) -> str:
    if math.isnan(result["low"]):
        return "–"
    low, high = (f"{100 * result[end]:+.1f}" if signed else percent(result[end]) for end in ("low", "high"))
    return f"{low} to {high}"


def _signed(difference: dict[str, float]) -> str:
    return "–" if math.isnan(difference["value"]) else f"{100 * difference['value']:+.1f}"


def _scale(comparison: dict[str, Any], key: str) -> float:
    """The largest distance from 0 that the drawings of a table show."""
    results = [result for _, rows in _rows(comparison, key) for _, result in rows[1:]]
    ends = [abs(result["difference"][end]) for result in results for end in ("low", "high", "value")]
    return max((end for end in ends if not math.isnan(end)), default=0.0) or 1.0


def _drawing(difference: dict[str, float], scale: float) -> str:
    """An inline SVG of the interval, with a dot at the difference; empty if it is undefined."""
    if math.isnan(difference["low"]) or math.isnan(difference["value"]):
        return ""

    def x(value: float) -> str:
        return f"{_WIDTH / 2 * (1 + 0.95 * value / scale):.1f}"

    middle = _HEIGHT / 2
    line = '<line x1="{}" x2="{}" y1="{}" y2="{}" stroke="{}" stroke-width="{}"/>'
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{_signed(difference)}, {_range(difference, signed=True)}">'
        + line.format(x(0), x(0), 0, _HEIGHT, "#888", 1)
        + line.format(x(difference["low"]), x(difference["high"]), middle, middle, "#1f77b4", 3)
        + f'<circle cx="{x(difference["value"])}" cy="{middle}" r="4" fill="#1f77b4"/></svg>'
    )
