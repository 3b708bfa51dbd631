"""Plots of a training run from Lightning's ``metrics.csv``."""

import csv
import logging
import math
from collections import defaultdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpm_rcnn.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)

_AP_COLUMNS = ("val/AP", "val/AP50", "val/AP75")
# Width of the moving average's window as a fraction of the run.
_SMOOTHED_OVER = 1 / 30

_Curve = tuple[np.ndarray, np.ndarray]


def plot_curves(csv_path: str | PathLike[str], out_dir: str | PathLike[str]) -> list[Path]:
    """Plot a run's losses and its average precision.

    ``loss.png`` shows the total loss and each named one (the columns that begin with ``train/loss``) on a logarithmic
    axis: logged values faint, moving averages solid. ``ap.png`` shows AP, AP50 and AP75 of every validation
    (``val/AP``, ...) in percent. A plot without content is not written.

    Args:
        csv_path: the ``metrics.csv`` of Lightning's ``CSVLogger``; earlier parts that :func:`keep_metrics` renamed are
            read too. Empty cells, non-finite values and values of -1 (undefined) are skipped.
        out_dir: the folder to write to; it is created if it is missing.

    Returns:
        The paths of the files written.

    Raises:
        UserError: the file cannot be read or has no ``step`` column.
    """
    curves = _joined([*_readable(_kept(Path(csv_path).parent)), _read(Path(csv_path))])
    losses = {name: curve for name, curve in curves.items() if name.startswith("train/loss")}
    precision = {name: curves[name] for name in _AP_COLUMNS if name in curves}
    figures = {}
    if losses:
        figures["loss.png"] = _loss_figure(losses)
    if precision:
        figures["ap.png"] = _ap_figure(precision)

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out_dir / name, dpi=120)
    return [out_dir / name for name in figures]


def keep_metrics(run_dir: Path, resuming: bool) -> None:
    """Rename a run's ``metrics.csv`` before Lightning's logger overwrites it.

    Args:
        run_dir: the run's folder.
        resuming: whether the run resumes an earlier one; if not, files of earlier runs are removed.
    """
    kept = _kept(run_dir)
    if not resuming:
        for path in kept:
            path.unlink()
    elif (run_dir / "metrics.csv").exists():
        (run_dir / "metrics.csv").rename(run_dir / f"metrics_{len(kept) + 1:03d}.csv")


def _kept(folder: Path) -> list[Path]:
    """The earlier parts of a run's metrics, in order."""
    return sorted(folder.glob("metrics_[0-9][0-9][0-9].csv"))


def _readable(paths: list[Path]) -> list[dict[str, _Curve]]:
    """The earlier parts of a run but those that it could not write, for example because the disk was full."""
    parts = []
    for path in paths:
        try:
            parts.append(_read(path))
        except UserError as error:
            _log.warning("%s; the curves lack this part", error)
    return parts


def _joined(parts: list[dict[str, _Curve]]) -> dict[str, _Curve]:
    """Curves over all parts of a run; where parts overlap, the later one counts."""
    whole: dict[str, _Curve] = {}
    for part in parts:
        start = min((steps[0] for steps, _ in part.values()), default=math.inf)
        cut = {name: (steps[steps < start], values[steps < start]) for name, (steps, values) in whole.items()}
        for name, (steps, values) in part.items():
            before = cut.get(name, (steps[:0], values[:0]))
            cut[name] = np.concatenate([before[0], steps]), np.concatenate([before[1], values])
        whole = cut
    return {name: curve for name, curve in whole.items() if len(curve[0])}


def _read(path: Path) -> dict[str, _Curve]:
    """Steps and values (float64, by ascending step) of each column; rows are sparse."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            if "step" not in (rows.fieldnames or ()):
                raise UserError(f"{path}: not a metrics.csv of Lightning: it has no column 'step'")
            for row in rows:
                step = _number(row.pop("step"))
                for name, cell in row.items():
                    value = _number(cell)
                    if math.isfinite(step) and math.isfinite(value) and value != -1:
                        points[name].append((step, value))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    curves = {}
    for name, pairs in points.items():
        steps, values = np.array(sorted(pairs, key=lambda pair: pair[0])).T
        curves[name] = steps, values
    return curves


def _number(cell: str | None) -> float:
    """The number in a cell; NaN if there is none, for example in the incomplete last line of a killed run."""
    try:
        return float(cell or "nan")
    except (TypeError, ValueError):
        return math.nan


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Centered moving average of values (N,); at both ends over the part of the window that exists."""
    window = np.ones(2 * round(len(values) * _SMOOTHED_OVER / 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _loss_figure(losses: dict[str, _Curve]) -> "Figure":
    figure, axes = _axes("Training loss", "loss")
    axes.set_yscale("log")
    # The total, which is the sum of the others, comes first and is black.
    for k, name in enumerate(sorted(losses)):
        steps, values = losses[name]
        total = name == "train/loss"
        color = "black" if total else f"C{k % 10}"
        axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(
            steps,
            _smoothed(values),
            color=color,
            linewidth=2.2 if total else 1.4,
            marker="." if len(steps) < 30 else None,
            label=name.removeprefix("train/"),
        )
    _add_legend(axes)
    return figure


def _ap_figure(precision: dict[str, _Curve]) -> "Figure":
    figure, axes = _axes("Validation", "average precision (%)")
    for name, (steps, values) in precision.items():
        axes.plot(steps, 100 * values, marker="o", markersize=4, label=name.removeprefix("val/"))
    if "val/AP" in precision:
        steps, values = precision["val/AP"]
        best = (steps[values.argmax()], 100 * values.max())
        axes.annotate(f"{best[1]:.1f}", best, (0, -14), textcoords="offset points", ha="center")
    axes.set_ylim(bottom=0)
    _add_legend(axes)
    return figure


def _axes(title: str, y_label: str) -> tuple["Figure", "Axes"]:
    # Imported here, because most commands plot nothing. pyplot would keep every figure alive and look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    axes.grid(which="both", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _add_legend(axes: "Axes") -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
