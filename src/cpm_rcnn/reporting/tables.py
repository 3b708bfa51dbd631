"""COCO metrics as a table on the terminal and as ``metrics.json``."""

import json
import math
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpm_rcnn.weights.writing import write_atomically

if TYPE_CHECKING:
    from cpm_rcnn.weights.starting import StartingDetector
    from cpm_rcnn.weights.transfer import Transfer

# Number of metrics per row, which gives the rows AP, AP by size, AR, and AR by size.
_PAIRS = 3


def metrics_table(metrics: dict[str, Any]) -> Table:
    """The twelve COCO metrics and the AP of each class, in percent.

    Args:
        metrics: the return value of ``CocoMetric.compute``. Undefined values (-1 or NaN) are shown as a dash.
    """
    table = Table(title="COCO metrics in percent", show_header=False)
    for _ in range(_PAIRS):
        table.add_column()
        table.add_column(justify="right")
    _add_pairs(table, ((name, value) for name, value in metrics.items() if name != "per_class"))
    table.add_section()
    _add_pairs(table, ((f"AP {name}", value) for name, value in metrics["per_class"].items()))
    return table


def transfer_table(start: "StartingDetector", transferred: Sequence["Transfer"]) -> Table:
    """Which parts of a model start from a file, and which are initialized."""
    table = Table(title=escape(start.source), title_justify="left")
    table.add_column("part")
    table.add_column("starting weights")
    for row in transferred:
        table.add_row(row.part, escape(row.details), style=None if row.taken else "yellow")
    return table


def print_transfer(
    start: "StartingDetector", transferred: Sequence["Transfer"], console: Console | None = None
) -> None:
    """Print what is known about the file, and :func:`transfer_table`, by default to the terminal."""
    console = console or Console()
    for note in start.notes:
        console.print(note, highlight=False, markup=False)
    console.print(transfer_table(start, transferred))


def print_metrics(metrics: dict[str, Any], console: Console | None = None) -> None:
    """Print :func:`metrics_table` to ``console``, by default the terminal."""
    (console or Console()).print(metrics_table(metrics))


def write_metrics(metrics: dict[str, Any], path: str | PathLike[str]) -> None:
    """Write the metrics, from 0 to 1, as JSON, completely or not at all; NaN becomes null.

    Missing folders are created.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(_without_nan(metrics), indent=2, ensure_ascii=False) + "\n"

    def write(file: BinaryIO) -> None:
        file.write(text.encode("utf-8"))

    write_atomically(Path(path), write)


def _add_pairs(table: Table, pairs: Iterable[tuple[str, float]]) -> None:
    cells = [cell for name, value in pairs for cell in (escape(name), percent(value))]
    for start in range(0, len(cells), 2 * _PAIRS):
        table.add_row(*cells[start : start + 2 * _PAIRS])


def percent(value: float) -> str:
    """A metric from 0 to 1 in percent; a dash if it is undefined."""
    return "–" if math.isnan(value) or value == -1 else f"{100 * value:.1f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
