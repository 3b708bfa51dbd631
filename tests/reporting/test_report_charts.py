"""SVG charts: where values are drawn, and what is shown in place of undefined ones."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from cpm_rcnn.reporting.report.charts import (
    WIDTH,
    Axis,
    Bar,
    Bin,
    Interval,
    Line,
    Plot,
    bar_chart,
    box_offset_drawing,
    column_chart,
    heat_map,
    interval_chart,
    line_chart,
    reliability_diagram,
    scatter_chart,
    share_axis,
    signed_text,
    value_axis,
)

NAN = math.nan
UNIT = Axis("score")


def parsed(chart):
    """The chart as XML; this fails if a text is not escaped."""
    return ET.fromstring(f"<div>{chart}</div>").find("svg")


def marks(chart, tag):
    return [element for element in parsed(chart).iter(tag) if "mark" in element.get("class", "").split()]


def points(data):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", data)]


def number(element, *names):
    return [float(element.get(name)) for name in names]


def test_values_lie_between_the_axes_with_y_upwards():
    plot = Plot(Axis("x", 10, 20), Axis("y", -1, 1), left=30, top=10, width=200, height=100)
    assert [plot.x_at(10), plot.x_at(15), plot.x_at(20)] == [30, 130, 230]
    assert [plot.y_at(-1), plot.y_at(0), plot.y_at(1)] == [110, 60, 10]


def test_a_line_passes_through_its_points():
    chart = line_chart("label", [Line("a", [(0, 0), (0.5, 1), (1, 0.25)], "blue")], UNIT, UNIT, "no data", height=250)
    (path,) = marks(chart, "path")
    plot = Plot(UNIT, UNIT, *map(float, parsed(chart).get("data-plot").split()[:4]))
    assert points(path.get("d")) == [
        (pytest.approx(plot.x_at(x), abs=0.06), pytest.approx(plot.y_at(y), abs=0.06))
        for x, y in [(0, 0), (0.5, 1), (1, 0.25)]
    ]


def test_undefined_values_leave_a_gap_and_a_single_point_stays_visible():
    values = [(0, 0.1), (0.2, NAN), (0.4, 0.5), (0.6, None), (0.8, 0.5), (1.0, 0.6)]
    (path,) = marks(line_chart("label", [Line("a", values, "blue")], UNIT, UNIT, "no data"), "path")
    assert re.sub(r"[\d. ]+", "", path.get("d").replace("h0", "h")) == "MhMhMhL"


def test_a_constant_series_has_an_axis_around_it():
    axis = value_axis("x", [3.0, 3.0], include=None)
    assert axis.low < 3 < axis.high
    assert value_axis("x", [0.0, 0.0]).low < 0 < value_axis("x", [0.0]).high


@pytest.mark.parametrize(
    ("values", "scale", "texts"),
    [
        ([0.117], 100, ["0", "5", "10", "15"]),
        ([-2.3, 3.1], 1, ["−4", "−2", "0", "2", "4"]),
        ([0.0021], 100, ["0.0", "0.1", "0.2", "0.3"]),
        ([NAN, None], 1, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
    ],
)
def test_ticks_are_round_and_contain_all_values(values, scale, texts):
    axis = value_axis("x", values, scale=scale)
    assert [axis.text(tick) for tick in axis.ticks] == texts
    assert all(axis.low <= value <= axis.high for value in values if value is not None and not math.isnan(value))


def test_bars_start_at_zero_and_grow_in_both_directions():
    bars = [Bar("gain", 0.1, "10.0"), Bar("loss", -0.05, "−5.0"), Bar("undefined", NAN, "–")]
    chart = bar_chart("label", bars, value_axis("points", [0.1, -0.05], scale=100), "no data")
    gain, loss = marks(chart, "rect")
    (gain_x, gain_width), (loss_x, loss_width) = number(gain, "x", "width"), number(loss, "x", "width")
    assert loss_x + loss_width == pytest.approx(gain_x, abs=0.11)
    assert gain_width == pytest.approx(2 * loss_width, abs=0.2)
    assert "–" in [text.text for text in parsed(chart).iter("text")]


def test_columns_have_heights_in_proportion_and_a_dash_for_undefined_values():
    chart = column_chart("label", ["small", "large"], [("AP", "blue", [0.2, 0.4]), ("AR", "orange", [NAN, 1.0])],
                         share_axis("percent"), "no data")  # fmt: skip
    heights = {rect.find("title").text: float(rect.get("height")) for rect in marks(chart, "rect")}
    assert list(heights) == ["small: AP 20.0", "large: AP 40.0", "large: AR 100.0"]
    assert heights["large: AP 40.0"] == pytest.approx(2 * heights["small: AP 20.0"], abs=0.2)
    assert [text.text for text in parsed(chart).iter("text") if "value" in text.get("class")].count("–") == 1


def test_an_interval_surrounds_its_value():
    rows = [Interval("left", 1.0, -0.5, 2.5, "+1.0", True), Interval("top", NAN, None, None, "–")]
    chart = interval_chart("label", rows, "pixels", "no data")
    (rect,), (circle,) = marks(chart, "rect"), marks(chart, "circle")
    (x, width), (center,) = number(rect, "x", "width"), number(circle, "cx")
    assert x + width / 2 == pytest.approx(center, abs=0.11)


def test_calibrated_scores_end_at_the_diagonal():
    bins = [Bin(k / 10, (k + 1) / 10, 5, (k + 0.5) / 10) for k in range(10)]
    chart = reliability_diagram("label", bins, "no data")
    (diagonal,) = [line for line in parsed(chart).iter("line") if line.get("class") == "diagonal"]
    x1, x2, y1, y2 = number(diagonal, "x1", "x2", "y1", "y2")
    columns = [rect for rect in marks(chart, "rect") if "soft" in rect.get("class")]
    assert len(columns) == 10
    for rect in columns:
        x, width, top = number(rect, "x", "width", "y")
        assert top == pytest.approx(y1 + (y2 - y1) * (x + width / 2 - x1) / (x2 - x1), abs=0.2)


def test_empty_bins_interrupt_the_mean_of_a_scatter_chart():
    bins = [Bin(0.0, 0.1, 9, 0.2, (0.1, 0.3)), Bin(0.1, 0.2, 4, 0.3, (0.2, 0.4)), Bin(0.3, 0.4, 1, 0.5, (0.5, 0.5))]
    chart = scatter_chart("label", [(0.0, 0.0), (1.0, 1.0), (NAN, 0.5)], bins, UNIT, Axis("IoU"), "no data", limit=0.5)
    dots = [circle for circle in marks(chart, "circle") if "dot" in circle.get("class")]
    assert [dot.get("class").split()[-1] for dot in dots] == ["gray", "blue"]
    (left, bottom), (right, top) = (number(dot, "cx", "cy") for dot in dots)
    assert left < right <= WIDTH
    assert top < bottom
    assert len([path for path in marks(chart, "path") if "line" in path.get("class")]) == 2
    assert len([path for path in marks(chart, "path") if "band" in path.get("class")]) == 1


def test_cells_are_shaded_by_their_share_of_the_row():
    chart = heat_map("label", ["cat", "dog", "background"], [[3, 1, 0], [0, 0, 0], [2, 0, 0]], "no data")
    opacity = [float(rect.get("style").split(":")[1]) for rect in marks(chart, "rect")]
    assert opacity == [0.75, 0.25, 0, 0, 0, 0, 1, 0, 0]


def test_the_drawn_box_differs_from_the_annotation_on_the_shifted_side_only():
    chart = box_offset_drawing("label", [0.0, 0.0, 0.02, NAN], [False] * 4, "no data")
    (annotated,) = parsed(chart).iter("rect")
    x, width = number(annotated, "x", "width")
    left, _, right, _ = (float(line.get("x1")) for line in marks(chart, "line"))
    assert left == x
    assert right == pytest.approx(x + 1.15 * width)


@pytest.mark.parametrize(
    "chart",
    [
        line_chart("label", [Line("a", [(0, NAN)], "blue")], UNIT, UNIT, "<no> data"),
        bar_chart("label", [Bar("a", None, "–")], UNIT, "<no> data"),
        column_chart("label", ["a"], [("AP", "blue", [NAN])], UNIT, "<no> data"),
        interval_chart("label", [Interval("a", NAN, NAN, NAN, "–")], "x", "<no> data"),
        reliability_diagram("label", [Bin(0, 1, 0, NAN)], "<no> data"),
        scatter_chart("label", [], [], UNIT, UNIT, "<no> data"),
        heat_map("label", ["a", "b"], [[0, 0], [0, 0]], "<no> data"),
        box_offset_drawing("label", [NAN] * 4, [False] * 4, "<no> data"),
    ],
)
def test_a_chart_without_data_is_a_sentence(chart):
    assert chart == '<p class="empty">&lt;no&gt; data</p>'


def test_names_are_escaped():
    name = "\"><script>alert('x')</script>&"
    line = line_chart(name, [Line(name, [(0, 1)], "blue")], UNIT, Axis(name), "no data")
    bar = bar_chart(name, [Bar(name, 1.0, name)], UNIT, "no data")
    matrix = heat_map(name, [name, name], [[1, 0], [0, 1]], "no data")
    for chart in (line, bar, matrix):
        assert "<script" not in chart
        assert parsed(chart).get("aria-label") == name
        assert parsed(chart).get("role") == "img"


def test_signed_numbers_use_a_minus_sign_and_have_no_negative_zero():
    assert [signed_text(value) for value in (1.25, -0.5, -0.01, NAN, None)] == ["+1.2", "−0.5", "±0.0", "–", "–"]
