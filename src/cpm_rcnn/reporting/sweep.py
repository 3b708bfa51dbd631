"""The results of a sweep's cells as one table: on the terminal, as csv, as Markdown and as a chart.

A cell is one training of a sweep (a Hydra multirun). Each cell has its own folder in the sweep's folder, with a record
``cell.json`` and, once it has finished, ``metrics.json``. Everything here is read from these files, so it does not
matter which process or machine trained a cell.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpm_rcnn.errors import UserError
from cpm_rcnn.reporting.tables import percent
from cpm_rcnn.weights.writing import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD = "cell.json"
MODULES = ("cmm", "ism", "rsm")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# Options that do not change the result of a cell: they name it, continue it, or decide what else it writes.
_NEUTRAL = {
    *("name", "sweep", "overwrite", "resume", "resume_changes", "checkpoint_interval", "process_timeout"),
    *("data.num_workers", "logger", "sheet_images"),
}
_DASH = "–"


@dataclass(frozen=True)
class Cell:
    """One training of a sweep.

    Attributes:
        folder: the folder of the training.
        number: position in the sweep.
        overrides: the overrides of the training, for example ``("head=faster", "seed=1")``.
        choices: the choices of the groups in :data:`MODULES`; ``none`` if the head has no such group.
        seed: the random seed.
        status: ``running``, ``finished``, ``failed`` or ``stopped`` (by a signal).
        error: one line that says why the cell failed or stopped.
        metrics: the content of ``metrics.json`` of a finished cell.
    """

    folder: Path
    number: int
    overrides: tuple[str, ...]
    choices: dict[str, str]
    seed: Any
    status: str = "running"
    error: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, str]:
        """The values of the overrides that can change the result, by key."""
        pairs = (override.lstrip("+").partition("=") for override in self.overrides)
        return {key: value for key, _, value in pairs if key not in _NEUTRAL and not key.startswith("logger.")}

    @property
    def finished(self) -> bool:
        """Whether the cell has its result."""
        return self.status == "finished"

    def metric(self, name: str) -> float:
        """A metric of a finished cell, from 0 to 1, or its minutes of training; NaN if it is undefined."""
        value = self.metrics.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value != -1
        return float(value) if number else math.nan  # type: ignore[arg-type]


@dataclass(frozen=True)
class Row:
    """A row of the table: the finished cells that differ in their seed only, or one cell without a result.

    Attributes:
        values: the value of each column of :attr:`SweepResults.columns`; None if the cell has no such override.
        cells: the cells.
    """

    values: tuple[str | None, ...]
    cells: tuple[Cell, ...]

    @property
    def finished(self) -> bool:
        """Whether the row has results."""
        return self.cells[0].finished

    def mean(self, name: str) -> float:
        """Mean of a metric over the cells; NaN if it is undefined in one of them."""
        return statistics.fmean(cell.metric(name) for cell in self.cells)

    def spread(self, name: str) -> float | None:
        """Sample standard deviation of a metric; None for a single cell."""
        values = [cell.metric(name) for cell in self.cells]
        if len(values) < 2:
            return None
        return math.nan if any(map(math.isnan, values)) else statistics.stdev(values)


@dataclass(frozen=True)
class SweepResults:
    """All cells of a sweep.

    Attributes:
        cells: the cells in the order of the sweep.
        columns: the override keys in which the cells differ, without ``seed``; the modules of an ablation are last.
        seeds: whether the cells have several seeds.
    """

    cells: tuple[Cell, ...]
    columns: tuple[str, ...]
    seeds: bool

    @property
    def rows(self) -> list[Row]:
        """The rows of the table, in the order of their first cells."""
        groups: dict[tuple[str | None, ...], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(tuple(_value(cell, column) for column in self.columns), []).append(cell)
        rows = []
        for values, cells in groups.items():
            if finished := tuple(cell for cell in cells if cell.finished):
                rows.append(Row(values, finished))
            rows += [Row(values, (cell,)) for cell in cells if not cell.finished]
        return rows

    @property
    def unfinished(self) -> list[Cell]:
        """The cells without a result."""
        return [cell for cell in self.cells if not cell.finished]


# --- records ---


def read_cell(folder: Path) -> Cell | None:
    """The cell in a folder; None if the folder has no record.

    A cell that is recorded as finished but has no readable ``metrics.json`` counts as unfinished.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / RECORD
    try:
        content = json.loads(path.read_text("utf-8"))
        content["overrides"] = tuple(content["overrides"])
        cell = Cell(folder=folder, **content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a record of a cell of a sweep; remove the folder to train it again") from error
    if not cell.finished:
        return cell
    try:
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        return Cell(folder=folder, **content, metrics=dict(metrics))
    except (OSError, ValueError, TypeError):
        return Cell(folder=folder, **content | {"status": "running"})


def write_record(cell: Cell) -> None:
    """Write a cell's record to its folder.

    Raises:
        UserError: the file cannot be written.
    """
    content = {name: value for name, value in asdict(cell).items() if name not in ("folder", "metrics")}
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    _write(cell.folder / RECORD, text.encode())


def read_sweep(sweep_dir: Path) -> SweepResults:
    """All cells in a sweep's folder, also those of earlier launches.

    Raises:
        UserError: a record is damaged.
    """
    found = (read_cell(path.parent) for path in sweep_dir.rglob(RECORD))
    cells = sorted((cell for cell in found if cell is not None), key=lambda cell: (cell.number, str(cell.folder)))
    keys = {key: None for cell in cells for key in cell.values if key not in ("seed", *MODULES)}
    columns = [key for key in keys if len({cell.values.get(key) for cell in cells}) > 1]
    # An ablation varies the modules themselves, or experiments that choose them. Another head has other defaults.
    varied = any(len({cell.values.get(module) for cell in cells}) > 1 for module in MODULES)
    if varied or "experiment" in columns:
        varied = any(len({cell.choices.get(module) for cell in cells}) > 1 for module in MODULES)
        columns += MODULES if varied else ()
    return SweepResults(tuple(cells), tuple(columns), len({str(cell.seed) for cell in cells}) > 1)


def _write(path: Path, content: bytes) -> None:
    def write(file: BinaryIO) -> None:
        file.write(content)

    write_atomically(path, write)


def _value(cell: Cell, column: str) -> str | None:
    return cell.choices.get(column) if column in MODULES else cell.values.get(column)


# --- rendering ---


def report_sweep(sweep_dir: Path, console: Console | None = None) -> SweepResults:
    """Print a sweep's table and write ``sweep.csv``, ``sweep.md``, ``sweep.png`` and ``cells.csv`` to its folder.

    Raises:
        UserError: a record is damaged, or a file cannot be written.
    """
    results = read_sweep(sweep_dir)
    console = console or Console()
    table = sweep_table(results)
    if not console.is_terminal:
        # Rich takes a file for a terminal of 80 columns and would break the numbers.
        natural = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console.width = max(console.width, natural)
    console.print(table)
    for cell in results.unfinished:
        console.print(_explanation(cell, sweep_dir), highlight=False, markup=False, soft_wrap=True)
    picture = io.BytesIO()
    sweep_figure(results).savefig(picture, format="png", dpi=120)
    files = {
        "sweep.csv": sweep_csv(results).encode(),
        "cells.csv": cells_csv(results, sweep_dir).encode(),
        "sweep.md": sweep_markdown(results, sweep_dir).encode(),
        "sweep.png": picture.getvalue(),
    }
    for name, content in files.items():
        _write(sweep_dir / name, content)
    return results


def sweep_table(results: SweepResults) -> Table:
    """The table for a terminal."""
    table = Table(title=_title(results), title_justify="left")
    head, lines = _text(results)
    first_number = len(head) - len(METRICS) - 1
    for k, name in enumerate(head):
        table.add_column(escape(name), justify="right" if k >= first_number else "left")
    for row, line in zip(results.rows, lines):
        table.add_row(*map(escape, line), style=None if row.finished else "red")
    return table


def sweep_markdown(results: SweepResults, sweep_dir: Path) -> str:
    """The table as Markdown, followed by the errors of the cells without a result."""
    head, lines = _text(results)
    first_number = len(head) - len(METRICS) - 1
    table = [head, ["---:" if k >= first_number else "---" for k in range(len(head))], *lines]
    text = [_title(results), ""]
    text += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
    if results.unfinished:
        text += ["", *(f"- {_explanation(cell, sweep_dir)}" for cell in results.unfinished)]
    return "\n".join(text) + "\n"


def sweep_csv(results: SweepResults) -> str:
    """The table as csv, with metrics in percent and the standard deviation of each in a column ``NAME_std``."""
    names = [*METRICS, "minutes"]
    head = [*results.columns, "seeds", "status", *(n for name in names for n in (name, f"{name}_std")), "error"]
    lines = []
    for row in results.rows:
        numbers: list[float | None] = []
        for name in names:
            numbers += [row.mean(name), row.spread(name)] if row.finished else [None, None]
        scale = [1 if name == "minutes" else 100 for name in names for _ in range(2)]
        lines.append(
            [
                *row.values,
                " ".join(str(cell.seed) for cell in row.cells),
                row.cells[0].status,
                *(_number(number, factor) for number, factor in zip(numbers, scale)),
                row.cells[0].error,
            ]
        )
    return _csv(head, lines)


def cells_csv(results: SweepResults, sweep_dir: Path) -> str:
    """The single cells as csv, with metrics in percent."""
    head = ["folder", *results.columns, "seed", "status", *METRICS, "minutes", "error"]
    lines = []
    for cell in results.cells:
        metrics = [_number(cell.metric(name), 100) for name in METRICS] + [_number(cell.metric("minutes"), 1)]
        values = [_value(cell, column) for column in results.columns]
        folder = cell.folder.relative_to(sweep_dir)
        lines.append([folder, *values, cell.seed, cell.status, *metrics, cell.error])
    return _csv(head, lines)


def sweep_figure(results: SweepResults) -> "Figure":
    """A bar of the AP of each row, with its spread and the AP of each seed; rows without a result say so."""
    # Imported here, because most commands plot nothing. pyplot would keep every figure alive and look for a display.
    from matplotlib.figure import Figure

    rows = results.rows
    figure = Figure(figsize=(8, 1.4 + 0.42 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        if not row.finished:
            axes.annotate(_status(row.cells[0]), (0, y), (4, 0), textcoords="offset points", va="center", color="C3")
            continue
        mean, spread = 100 * row.mean("AP"), row.spread("AP")
        if math.isnan(mean):
            axes.annotate("undefined", (0, y), (4, 0), textcoords="offset points", va="center")
            continue
        axes.barh(y, mean, height=0.62, color="C0", xerr=None if spread is None else 100 * spread, capsize=3)
        top = mean + 100 * (spread or 0)
        if spread is not None:
            axes.plot([100 * cell.metric("AP") for cell in row.cells], [y] * len(row.cells), "k.", markersize=5)
        axes.annotate(_percent(row, "AP"), (top, y), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [_label(results.columns, row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.2)
    axes.set_title(_title(results))
    axes.set_xlabel("average precision (%)")
    axes.grid(axis="x", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _text(results: SweepResults) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table as text."""
    named = [column.upper() if column in MODULES else column for column in results.columns] or ["cell"]
    head = [*named, *(["seeds"] if results.seeds else []), *METRICS, "minutes"]
    lines = []
    for row in results.rows:
        line = [_shown(column, value) for column, value in zip(results.columns, row.values)]
        line = line or [row.cells[0].folder.name if len(row.cells) == 1 else "all"]
        if results.seeds:
            line.append(", ".join(str(cell.seed) for cell in row.cells))
        if row.finished:
            line += [*(_percent(row, name) for name in METRICS), _minutes(row)]
        else:
            line += [_status(row.cells[0]), *[""] * len(METRICS)]
        lines.append(line)
    return head, lines


def _title(results: SweepResults) -> str:
    several = any(len(row.cells) > 1 for row in results.rows)
    return "COCO metrics in percent" + (", mean ± standard deviation over seeds" if several else "")


def _shown(column: str, value: str | None) -> str:
    if column in MODULES:
        return {"on": "✓", "off": _DASH, "none": _DASH, None: _DASH}.get(value, str(value))
    return _DASH if value is None else value


def _label(columns: Sequence[str], row: Row) -> str:
    """A short name of a row, such as ``CMM + RSM`` or ``head=faster``."""
    pairs = dict(zip(columns, row.values))
    modules = [
        name.upper() + ("" if pairs[name] == "on" else f" {pairs[name]}")
        for name in MODULES
        if pairs.get(name) not in (None, "off", "none")
    ]
    parts = [f"{key.rpartition('.')[2]}={_shown(key, value)}" for key, value in pairs.items() if key not in MODULES]
    if any(name in pairs for name in MODULES):
        parts.append(" + ".join(modules) or "no module")
    return " ".join(parts) or row.cells[0].folder.name


def _percent(row: Row, name: str) -> str:
    spread = row.spread(name)
    return percent(row.mean(name)) + ("" if spread is None or math.isnan(spread) else f" ± {percent(spread)}")


def _minutes(row: Row) -> str:
    mean = row.mean("minutes")
    return _DASH if math.isnan(mean) else f"{mean:.1f}"


def _status(cell: Cell) -> str:
    return "failed" if cell.status == "failed" else "unfinished"


def _explanation(cell: Cell, sweep_dir: Path) -> str:
    reason = cell.error or "the cell is running, or its process was killed"
    return f"{cell.folder.relative_to(sweep_dir)}: {_status(cell)}: {reason}"


def _number(value: float | None, factor: float) -> str:
    return "" if value is None or math.isnan(value) else f"{value * factor:.6g}"


def _csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([head, *lines])
    return file.getvalue()
