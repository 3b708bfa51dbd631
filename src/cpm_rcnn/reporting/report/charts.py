"""Charts as inline SVG.

Charts are 340 units wide and their text is 12 units high, so that they are readable on a phone without zooming;
wide pages place several of them in a row. Colors are variables of the page's style sheet: ``color`` arguments are names
such as ``blue``. Elements that show a value have the class ``mark``. A chart without any defined value is replaced by a
sentence.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

WIDTH = 340.0
_CHARACTER = 6.7  # average width of a character of 12 units


def defined(value: float | None) -> bool:
    """Whether a value is a finite number."""
    return value is not None and math.isfinite(value)


def percent_text(value: float | None, decimals: int = 0) -> str:
    """A share in percent without unit; a dash if it is undefined."""
    return f"{100 * value:.{decimals}f}" if value is not None and defined(value) else "–"


def signed_text(value: float | None, decimals: int = 1, scale: float = 1.0) -> str:
    """A value with its sign; a dash if it is undefined."""
    if value is None or not defined(value):
        return "–"
    text = f"{value * scale:+.{decimals}f}"
    return text.replace("-", "−") if float(text) else f"±{0:.{decimals}f}"


@dataclass(frozen=True)
class Axis:
    """The range of an axis.

    Attributes:
        title: what it shows, with its unit.
        low: the value at its start.
        high: the value at its end; larger than ``low``.
        ticks: the values with a number.
        text: the text of a tick.
    """

    title: str
    low: float = 0.0
    high: float = 1.0
    ticks: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    text: Callable[[float], str] = "{:.1f}".format


def share_axis(title: str) -> Axis:
    """An axis from 0 to 1 with ticks in percent."""
    return Axis(title, text=percent_text)


def value_axis(title: str, values: Iterable[float | None], include: float | None = 0.0, scale: float = 1.0) -> Axis:
    """An axis with round ticks around all defined values.

    Args:
        title: the title.
        values: the values; undefined ones are ignored. If all are equal, the axis extends to both sides of them.
        include: a value that the axis must contain.
        scale: factor of the numbers of the ticks, for example 100 for shares in percent.
    """
    known = [float(value) for value in values if value is not None and defined(value)]
    known += [] if include is None else [include]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if low == high:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) * scale / 4)
    first, last = math.floor(low * scale / step + 1e-9), math.ceil(high * scale / step - 1e-9)
    ticks = [number * step / scale for number in range(first, last + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(
        title, ticks[0], ticks[-1], ticks, lambda value: f"{value * scale + 0.0:,.{decimals}f}".replace("-", "−")
    )


def _round_step(step: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


class Plot:
    """The area of a chart between two axes, in units of the SVG; y grows downwards."""

    def __init__(self, x: Axis, y: Axis, left: float, top: float, width: float, height: float):
        self.x, self.y = x, y
        self.left, self.top, self.width, self.height = left, top, width, height

    def x_at(self, value: float) -> float:
        return self.left + self.width * (value - self.x.low) / (self.x.high - self.x.low)

    def y_at(self, value: float) -> float:
        return self.top + self.height * (1 - (value - self.y.low) / (self.y.high - self.y.low))

    def axes(self, y_title: bool = True, x_numbers: bool = True, columns: bool = False) -> Markup:
        """Grid lines, ticks and titles."""
        right, bottom = self.left + self.width, self.top + self.height
        parts = []
        for tick in self.y.ticks:
            y = self.y_at(tick)
            parts.append(_line(self.left, y, right, y, "grid"))
            parts.append(_text(self.left - 6, y + 4, self.y.text(tick), "tick end"))
        for tick in self.x.ticks:
            x = self.x_at(tick)
            if columns:
                parts.append(_line(x, self.top, x, bottom, "grid"))
            if x_numbers:
                parts.append(_text(x, bottom + 16, self.x.text(tick), "tick middle"))
        parts.append(_line(self.left, bottom, right, bottom, "axis"))
        if x_numbers:
            parts.append(_text(self.left + self.width / 2, bottom + 33, self.x.title, "name middle"))
        if y_title:
            parts.append(_text(self.left - 30, self.top - 10, self.y.title, "name"))
        return Markup("").join(parts)

    def attributes(self) -> Markup:
        """The geometry as an attribute, from which the page's script draws other values."""
        numbers = (self.left, self.top, self.width, self.height, self.x.low, self.x.high, self.y.low, self.y.high)
        return Markup(' data-plot="{}"').format(" ".join(f"{number:g}" for number in numbers))

    def path(self, points: Iterable[tuple[float | None, float | None]]) -> str:
        """The data of a path through points; undefined ones leave gaps."""
        parts, pen = [], "M"
        for x, y in points:
            if x is None or y is None or not (defined(x) and defined(y)):
                pen = "M"
                continue
            # A zero-length segment makes a single point visible.
            start = "h0" if pen == "M" else ""
            parts.append(f"{pen}{self.x_at(x):.1f} {self.y_at(y):.1f}{start}")
            pen = "L"
        return "".join(parts)


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: its name in the legend.
        points: (x, y) pairs; undefined ones leave gaps.
        color: its color.
        dash: the dash pattern, so that lines differ without color.
        key: a name by which the page's script finds it.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    color: str
    dash: str = ""
    key: str = ""


def line_chart(label: str, lines: Sequence[Line], x: Axis, y: Axis, empty: str, height: float = 250) -> Markup:
    """Lines with a legend.

    Args:
        label: a description for screen readers.
        lines: the lines.
        x: horizontal axis.
        y: vertical axis.
        empty: the sentence that is shown if no line has a defined value.
        height: height of the SVG.
    """
    if not any(defined(value) for line in lines for _, value in line.points):
        return no_data(empty)
    plot = Plot(x, y, 38, 26, WIDTH - 50, height - 26 - 42)
    marks, targets = [], []
    for line in lines:
        marks.append(
            Markup(
                '<path class="mark line {}" data-key="{}" d="{}" stroke-dasharray="{}"><title>{}</title></path>'
            ).format(line.color, line.key, plot.path(line.points), line.dash or "none", line.name)
        )
        known = [(at, value) for at, value in line.points if defined(value)]
        for at, value in known[:: max(1, len(known) // 20)]:
            assert value is not None
            title = f"{line.name}: {y.text(value)} at {x.title} {x.text(at)}"
            targets.append(_circle(plot.x_at(at), plot.y_at(value), 7, "target", title))
    body = plot.axes() + Markup("").join(marks) + Markup('<g class="targets">{}</g>').format(Markup("").join(targets))
    return _svg(label, height, body, plot.attributes()) + legend([(line.name, line.color, line.dash) for line in lines])


@dataclass(frozen=True)
class Bar:
    """A bar: its name, its value, the text next to it, its color and the text of its tooltip."""

    name: str
    value: float | None
    text: str
    color: str = "blue"
    title: str = ""


def bar_chart(label: str, bars: Sequence[Bar], axis: Axis, empty: str) -> Markup:
    """Horizontal bars with their values; ``axis`` contains 0."""
    if not any(defined(bar.value) for bar in bars):
        return no_data(empty)
    row = 30
    left = min(130.0, 10 + _CHARACTER * max(len(bar.name) for bar in bars))
    right = 8 + _CHARACTER * max(len(bar.text) for bar in bars)
    plot = Plot(axis, Axis("", ticks=()), left, 4, WIDTH - left - right, row * len(bars))
    zero = plot.x_at(0)
    parts = []
    for number, bar in enumerate(bars):
        y = plot.top + row * number
        parts.append(_text(left - 8, y + 19, shorten(bar.name, left - 8), "label end"))
        end = zero
        if bar.value is not None and defined(bar.value):
            end = plot.x_at(bar.value)
            width = max(abs(end - zero), 1.0)
            title = bar.title or f"{bar.name}: {bar.text}"
            parts.append(_rectangle(min(zero, end), y + 6, width, row - 12, f"mark {bar.color}", title))
        parts.append(_text(max(zero, end) + 6, y + 19, bar.text, "value"))
    return _svg(label, plot.height + 46, plot.axes(columns=True) + Markup("").join(parts))


def column_chart(
    label: str, groups: Sequence[str], series: Sequence[tuple[str, str, Sequence[float | None]]], y: Axis, empty: str
) -> Markup:
    """Grouped columns with their values in percent.

    Args:
        label: a description for screen readers.
        groups: the names of the groups.
        series: name, color and one value per group, each from 0 to 1; undefined values are shown as a dash.
        y: vertical axis, which starts at 0.
        empty: the sentence that is shown if no value is defined.
    """
    if not any(defined(value) for _, _, values in series for value in values):
        return no_data(empty)
    height = 220.0
    plot = Plot(Axis("", ticks=()), y, 38, 26, WIDTH - 50, height - 26 - 24)
    step = plot.width / len(groups)
    width = min(44.0, 0.72 * step / len(series))
    parts = []
    for i, group in enumerate(groups):
        middle = plot.left + step * (i + 0.5)
        parts.append(_text(middle, height - 8, shorten(group, step), "label middle"))
        for j, (name, color, values) in enumerate(series):
            x, value = middle + width * (j - len(series) / 2), values[i]
            top = plot.y_at(0)
            if value is not None and defined(value):
                top = plot.y_at(value)
                title = f"{group}: {name} {100 * value:.1f}"
                parts.append(_rectangle(x + 1.5, top, width - 3, plot.y_at(0) - top, f"mark {color}", title))
            parts.append(_text(x + width / 2, top - 5, percent_text(value, 1), "value middle"))
    svg = _svg(label, height, plot.axes() + Markup("").join(parts))
    return svg + legend([(name, color, None) for name, color, _ in series])


@dataclass(frozen=True)
class Interval:
    """A row of an interval chart: a value, an interval around it, its text, and whether it is emphasized."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    text: str
    clear: bool = False


def interval_chart(label: str, rows: Sequence[Interval], title: str, empty: str) -> Markup:
    """Horizontal intervals with a dot each, on an axis that contains 0."""
    ends = [end for row in rows for end in (row.low, row.high, row.value)]
    if not any(defined(row.value) for row in rows):
        return no_data(empty)
    step = 34
    right = 10 + _CHARACTER * max(len(row.text) for row in rows)
    plot = Plot(value_axis(title, ends), Axis("", ticks=()), 62, 6, WIDTH - 62 - right, step * len(rows))
    zero = plot.x_at(0)
    parts = [_line(zero, plot.top, zero, plot.top + plot.height, "axis")]
    for number, row in enumerate(rows):
        y = plot.top + step * (number + 0.5)
        parts.append(_text(plot.left - 12, y + 4, row.name, "label end"))
        parts.append(_text(WIDTH - 2, y + 4, row.text, "value end strong" if row.clear else "value end"))
        color = "vermillion" if row.clear else "blue"
        if row.value is None or not defined(row.value):
            continue
        tooltip = f"{row.name}: {row.text}"
        if row.low is not None and row.high is not None and defined(row.low) and defined(row.high):
            start, end = plot.x_at(row.low), plot.x_at(row.high)
            parts.append(_rectangle(start, y - 4, max(end - start, 1), 8, f"mark soft {color}", tooltip))
        parts.append(_circle(plot.x_at(row.value), y, 5, f"mark {color}", tooltip))
    return _svg(label, plot.height + 50, plot.axes(columns=True) + Markup("").join(parts))


def box_offset_drawing(label: str, relative: Sequence[float | None], clear: Sequence[bool], empty: str) -> Markup:
    """A box and a second one whose edges differ, exaggerated.

    Args:
        label: a description for screen readers.
        relative: the differences of left, top, right and bottom in shares of the box.
        clear: which edges are emphasized.
        empty: the sentence that is shown if no difference is defined.
    """
    if not any(defined(value) for value in relative):
        return no_data(empty)
    shares = [value if value is not None and defined(value) else 0.0 for value in relative]
    factor = min(50.0, 0.15 / (max(map(abs, shares)) or 1.0))
    left, top, width, height = 100.0, 42.0, 140.0, 140.0
    x1, y1 = left + factor * shares[0] * width, top + factor * shares[1] * height
    x2, y2 = left + width * (1 + factor * shares[2]), top + height * (1 + factor * shares[3])
    parts = [_rectangle(left, top, width, height, "annotated", "annotation")]
    edges = ((x1, y1, x1, y2), (x1, y1, x2, y1), (x2, y1, x2, y2), (x1, y2, x2, y2))
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    places = (
        (min(x1, left) - 10, y + 4, "end"),
        (x, min(y1, top) - 10, "middle"),
        (max(x2, left + width) + 10, y + 4, ""),
        (x, max(y2, top + height) + 20, "middle"),
    )
    for edge, (x, y, anchor), value, emphasized in zip(edges, places, relative, clear, strict=True):
        parts.append(_line(*edge, f"mark detected {'vermillion' if emphasized else 'blue'}"))
        number = signed_text(value, 1, 100)
        parts.append(
            _text(x, y, f"{number} %" if defined(value) else number, f"value {anchor}{' strong' * emphasized}")
        )
    return _svg(label, 224, Markup('<g class="drawing">{}</g>').format(Markup("").join(parts)))


@dataclass(frozen=True)
class Bin:
    """A bin of the horizontal axis: its range, how many values it has, their mean, and an interval of them."""

    low: float
    high: float
    count: int
    mean: float | None
    interval: tuple[float, float] | None = None


def reliability_diagram(label: str, bins: Sequence[Bin], empty: str) -> Markup:
    """Precision against score: bars that should end at the diagonal, and the number of detections below."""
    if not any(each.count and defined(each.mean) for each in bins):
        return no_data(empty)
    plot = Plot(Axis("score"), share_axis("precision (%)"), 38, 26, WIDTH - 50, 220)
    parts = [plot.axes(x_numbers=False)]
    for each in bins:
        if not each.count or each.mean is None or not defined(each.mean):
            continue
        x, width = plot.x_at(each.low) + 1, plot.x_at(each.high) - plot.x_at(each.low) - 2
        middle, top = (each.low + each.high) / 2, plot.y_at(each.mean)
        title = f"score {each.low:.2f} to {each.high:.2f}: precision {percent_text(each.mean, 1)} %"
        title += f", {each.count:,} detections"
        parts.append(_rectangle(x, top, width, plot.y_at(0) - top, "mark soft blue", title))
        parts.append(_line(x, top, x + width, top, "cap blue"))
        ideal = plot.y_at(middle)
        parts.append(_rectangle(x, min(top, ideal), width, max(abs(top - ideal), 0.1), "gap", title))
    parts.append(_line(plot.x_at(0), plot.y_at(0), plot.x_at(1), plot.y_at(1), "diagonal"))
    counts = _counts(bins, Axis("score"), plot.left, plot.top + plot.height + 26, plot.width, 44)
    return _svg(label, 26 + 220 + 26 + 44 + 42, Markup("").join([*parts, counts]))


def scatter_chart(
    label: str,
    points: Sequence[Sequence[float | None]],
    bins: Sequence[Bin],
    x: Axis,
    y: Axis,
    empty: str,
    limit: float | None = None,
    diagonal: bool = False,
) -> Markup:
    """Points, the mean of each bin with its interval as a band, and the number of values per bin above them.

    Args:
        label: a description for screen readers.
        points: (x, y) pairs; undefined ones are not drawn.
        bins: the bins of the horizontal axis; empty ones leave gaps.
        x: horizontal axis.
        y: vertical axis.
        empty: the sentence that is shown if there is neither a point nor a mean.
        limit: a value of y with a line; points below it have another color.
        diagonal: draw the line where x equals y.
    """
    known = [(a, b) for a, b in points if a is not None and b is not None and defined(a) and defined(b)]
    means = [each for each in bins if each.count and defined(each.mean)]
    if not known and not means:
        return no_data(empty)
    plot = Plot(x, y, 38, 84, WIDTH - 50, 262)
    parts = [plot.axes(columns=True), _counts(bins, x, plot.left, 22, plot.width, 38, numbers=False)]
    parts += [_text(plot.left - 30, 11, "detections", "name")]
    dots = []
    for a, b in known:
        color = "gray" if limit is not None and b < limit else "blue"
        dots.append(_circle(plot.x_at(a), plot.y_at(b), 2.6, f"mark dot {color}", f"{a:.2f}, {b:.2f}"))
    parts.append(Markup("").join(dots))
    if limit is not None:
        parts.append(_line(plot.left, plot.y_at(limit), plot.left + plot.width, plot.y_at(limit), "limit"))
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        parts.append(_line(plot.x_at(low), plot.y_at(low), plot.x_at(high), plot.y_at(high), "diagonal"))
    for run in _runs(means):
        edges = [(_middle(each), each.interval) for each in run if each.interval is not None]
        if len(edges) > 1:
            outline = [(at, high) for at, (_, high) in edges] + [(at, low) for at, (low, _) in reversed(edges)]
            parts.append(Markup('<path class="mark band orange" d="{}Z"/>').format(plot.path(outline)))
        line = plot.path([(_middle(each), each.mean) for each in run])
        parts.append(
            Markup('<path class="mark casing" d="{}"/><path class="mark line orange" d="{}"/>').format(line, line)
        )
    for each in means:
        assert each.mean is not None
        title = (
            f"{x.title} {each.low:.2f} to {each.high:.2f}: mean {y.title} {each.mean:.2f}, {each.count:,} detections"
        )
        parts.append(_circle(plot.x_at(_middle(each)), plot.y_at(each.mean), 4.2, "mark knot orange", title))
    return _svg(label, 84 + 262 + 42, Markup("").join(parts))


def _counts(
    bins: Sequence[Bin], x: Axis, left: float, top: float, width: float, height: float, numbers: bool = True
) -> Markup:
    """How many values each bin has, as columns without a vertical axis."""
    most = max((each.count for each in bins), default=0) or 1
    plot = Plot(x, Axis("", high=most, ticks=()), left, top, width, height)
    parts = [plot.axes(y_title=False, x_numbers=numbers)]
    for each in bins:
        if each.count:
            start, end, y = plot.x_at(each.low) + 1, plot.x_at(each.high) - 1, plot.y_at(each.count)
            title = f"{each.low:.2f} to {each.high:.2f}: {each.count:,} detections"
            y = min(y, top + height - 1)
            parts.append(_rectangle(start, y, max(end - start, 1), top + height - y, "mark gray", title))
    return Markup("").join(parts)


def _middle(each: Bin) -> float:
    return (each.low + each.high) / 2


def _runs(bins: Sequence[Bin]) -> list[list[Bin]]:
    """The bins in groups of neighbors without gaps."""
    if not bins:
        return []
    runs = [[bins[0]]]
    for before, each in pairwise(bins):
        if each.low - before.high > 1e-6:
            runs.append([])
        runs[-1].append(each)
    return runs


def heat_map(label: str, names: Sequence[str], counts: Sequence[Sequence[int]], empty: str) -> Markup:
    """A square matrix whose cells are shaded by the share of their row.

    Args:
        label: a description for screen readers.
        names: one per row and column.
        counts: the matrix.
        empty: the sentence that is shown if all counts are 0.
    """
    if not any(map(any, counts)):
        return no_data(empty)
    margin = min(106.0, 14 + _CHARACTER * max(map(len, names)))
    size = (WIDTH - margin - 2) / len(names)
    font = min(12.0, max(10.0, size * 0.8))
    slanted = size < _CHARACTER * max(map(len, names))
    top = 6 + (margin if slanted else 16)
    parts = []
    for i, name in enumerate(names):
        middle = margin + size * (i + 0.5)
        short = shorten(name, (margin - 10) * 12 / font)
        place = Markup('style="font-size:{:.1f}px"').format(font)
        turned = Markup('transform="rotate(-90 {:.1f} {:.1f})"').format(middle + font / 3, top - 6) if slanted else ""
        anchor = "label" if slanted else "label middle"
        at = middle + font / 3 if slanted else middle
        parts.append(_text(at, top - 6, short, anchor, Markup("{} {}").format(place, turned)))
        parts.append(_text(margin - 6, top + size * (i + 0.5) + font / 3, short, "label end", place))
        total = sum(counts[i])
        for j, count in enumerate(counts[i]):
            share = count / total if total else 0.0
            title = f"annotated {name}, detected {names[j]}: {count:,} ({100 * share:.1f} % of the row)"
            x, y = margin + size * j, top + size * i
            kind = "cell hit" if i == j else "cell error"
            fill = Markup('style="fill-opacity:{:.3f}"').format(max(share, 0.04 if count else 0.0))
            parts.append(_rectangle(x + 0.5, y + 0.5, size - 1, size - 1, f"mark {kind}", title, fill))
            if size >= 24 and count:
                tone = "count dark" if share > 0.55 else "count"
                parts.append(_text(x + size / 2, y + size / 2 + 4, f"{100 * share:.0f}", tone))
    return _svg(label, top + size * len(names) + 4, Markup("").join(parts))


def legend(entries: Iterable[tuple[str, str, str | None]]) -> Markup:
    """The names of lines or areas.

    Args:
        entries: name, color and dash pattern; without a pattern (None), the sample is a square.
    """
    items = []
    for name, color, dash in entries:
        if dash is None:
            sample = Markup('<rect class="{}" x="4" y="1" width="12" height="12" rx="2"/>').format(color)
        else:
            sample = Markup('<path class="line {}" d="M1 7H21" stroke-dasharray="{}"/>').format(color, dash or "none")
        items.append(
            Markup('<li><svg width="22" height="14" viewBox="0 0 22 14" aria-hidden="true">{}</svg>{}</li>').format(
                sample, name
            )
        )
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def no_data(sentence: str) -> Markup:
    """The sentence in place of a chart."""
    return Markup('<p class="empty">{}</p>').format(sentence)


def shorten(text: str, width: float) -> str:
    """The text, with an ellipsis if it is wider than ``width`` units."""
    most = max(1, int(width / _CHARACTER))
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def _svg(label: str, height: float, body: Markup, attributes: Markup = Markup("")) -> Markup:  # noqa: B008
    return Markup('<svg class="chart" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}"{}>{}</svg>').format(
        WIDTH, height, label, attributes, body
    )


def _text(x: float, y: float, text: str, classes: str, attributes: Markup = Markup("")) -> Markup:  # noqa: B008
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" {}>{}</text>').format(x, y, classes, attributes, text)


def _line(x1: float, y1: float, x2: float, y2: float, classes: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, classes)


def _rectangle(
    x: float,
    y: float,
    width: float,
    height: float,
    classes: str,
    title: str,
    attributes: Markup = Markup(""),  # noqa: B008
) -> Markup:
    return Markup(
        '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}" {}><title>{}</title></rect>'
    ).format(x, y, width, height, classes, attributes, title)


def _circle(x: float, y: float, radius: float, classes: str, title: str) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" class="{}"><title>{}</title></circle>').format(
        x, y, radius, classes, title
    )
