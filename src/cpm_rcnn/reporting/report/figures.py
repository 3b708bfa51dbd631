"""The charts of a report."""

from typing import Any

import numpy as np
from markupsafe import Markup

from cpm_rcnn.reporting.report.charts import (
    Axis,
    Bar,
    Bin,
    Interval,
    Line,
    bar_chart,
    box_offset_drawing,
    column_chart,
    defined,
    heat_map,
    interval_chart,
    line_chart,
    percent_text,
    reliability_diagram,
    scatter_chart,
    share_axis,
    signed_text,
    value_axis,
)

# IoU thresholds of the precision-recall curves: key, name, color, dash.
PRECISION_LINES = (
    ("0.50", "IoU 0.50", "blue", ""),
    ("0.75", "IoU 0.75", "orange", "6 3"),
    ("0.50:0.95", "IoU 0.50:0.95", "green", "2 3"),
)
THRESHOLD_LINES = (
    ("f1", "F1", "blue", ""),
    ("precision_at", "precision", "orange", "6 3"),
    ("recall_at", "recall", "green", "2 3"),
)
# A larger confusion matrix shows the classes with most confusions only.
_LARGEST_MATRIX = 16
_SIDES = ("left", "top", "right", "bottom")


def size_columns(sizes: list[dict[str, Any]]) -> Markup:
    """AP and AR by object size."""
    series = [(name, color, [size[name] for size in sizes]) for name, color in (("AP", "blue"), ("AR", "orange"))]
    return column_chart(
        "AP and AR of small, medium and large objects",
        [f"{size['name']} ({size['objects']:,})" for size in sizes],
        series,
        share_axis("percent"),
        "There are no objects.",
    )


def precision_recall(curves: dict[str, Any]) -> Markup:
    """Precision-recall curves of the mean."""
    precision = curves["series"][0]["precision"]
    lines = [
        Line(name, list(zip(curves["recalls"], precision[key])), color, dash, key)
        for key, name, color, dash in PRECISION_LINES
        if key in precision
    ]
    empty = "Precision is undefined, because there are no objects."
    label = "Precision against recall at three IoU thresholds"
    return line_chart(label, lines, share_axis("recall (%)"), share_axis("precision (%)"), empty)


def against_threshold(curves: dict[str, Any]) -> Markup:
    """F1, precision and recall of the mean against the score threshold."""
    first = curves["series"][0]
    lines = [
        Line(name, list(zip(curves["thresholds"], first[key])), color, dash, key)
        for key, name, color, dash in THRESHOLD_LINES
    ]
    empty = "F1, precision and recall are undefined, because there are no objects or no detections."
    label = "F1, precision and recall against the score threshold"
    return line_chart(label, lines, Axis("score threshold"), share_axis("percent"), empty)


def encoded_series(curves: dict[str, Any]) -> list[dict[str, Any]]:
    """The curves of all classes for the page's script: two digits of base 36 per value, 0 to 1295; spaces if undefined.

    This takes a fifth of the space of decimal numbers, which matters with a thousand classes.
    """
    keys = [key for key, *_ in THRESHOLD_LINES]
    return [
        {"name": series["name"]}
        | {key: _encode(values) for key, values in series["precision"].items()}
        | {key: _encode(series[key]) for key in keys}
        for series in curves["series"]
    ]


_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _encode(values: list[float | None]) -> str:
    parts = []
    for value in values:
        number = round(1295 * min(max(value, 0.0), 1.0)) if value is not None and defined(value) else None
        parts.append("  " if number is None else _DIGITS[number // 36] + _DIGITS[number % 36])
    return "".join(parts)


def left_out(confusion: dict[str, Any]) -> int:
    """How many classes the drawn confusion matrix leaves out."""
    return max(0, len(confusion["counts"]) - 1 - _LARGEST_MATRIX)


def _shown_classes(confusion: dict[str, Any]) -> tuple[list[str], list[list[int]]]:
    """Names and counts of the confusion matrix that is drawn; of many classes, those with most confusions."""
    counts = confusion["counts"]
    last = len(counts) - 1
    names = [*confusion["classes"][:last], "background"]
    if not left_out(confusion):
        return names, counts
    matrix = np.array(counts)[:last, :last]
    np.fill_diagonal(matrix, 0)
    wrong = matrix.sum(axis=0) + matrix.sum(axis=1)
    kept = sorted(np.argsort(-wrong, kind="stable")[:_LARGEST_MATRIX].tolist())
    kept.append(last)
    return [names[i] for i in kept], [[counts[i][j] for j in kept] for i in kept]


def confusion_matrix(confusion: dict[str, Any]) -> Markup:
    """The confusion matrix."""
    names, counts = _shown_classes(confusion)
    return heat_map(
        "Annotated against detected classes", names, counts, "There are neither objects nor detections to count."
    )


def most_confused(confusion: dict[str, Any], most: int = 12) -> list[dict[str, Any]]:
    """Pairs of different classes that were confused most often: names, count and share of the annotated class."""
    counts = np.array(confusion["counts"])
    totals = counts.sum(axis=1)
    wrong = counts[:-1, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most].tolist()
    pairs = [divmod(place, len(wrong)) for place in order]
    names = confusion["classes"]
    return [
        {"annotated": names[i], "detected": names[j], "count": int(wrong[i, j]), "share": wrong[i, j] / totals[i]}
        for i, j in pairs
        if wrong[i, j]
    ]


def error_bars(errors: dict[str, Any]) -> Markup:
    """AP50 that each kind of error costs."""
    gains = [each["delta_ap"] for each in errors["types"]]
    bars = [Bar(each["name"], each["delta_ap"], percent_text(each["delta_ap"], 1)) for each in errors["types"]]
    axis = value_axis("AP50 gained without these errors (points)", gains, scale=100)
    return bar_chart("AP50 gained if all errors of a kind were corrected", bars, axis, "There are no errors.")


def calibration_diagram(calibration: dict[str, Any]) -> Markup:
    """Precision against score."""
    bins = [Bin(each["low"], each["high"], each["count"], each["precision"]) for each in calibration["bins"]]
    return reliability_diagram("Precision against score", bins, "There are no detections.")


def score_panel(panel: dict[str, Any], found_iou: float, diagonal: bool = False) -> Markup:
    """IoU against score; with ``diagonal``, against an IoU that was predicted."""
    bins = [
        Bin(each["low"], each["high"], each["count"], each["iou_mean"], _interval(each["iou_low"], each["iou_high"]))
        for each in panel["bins"]
    ]
    x = Axis("predicted IoU" if diagonal else "score")
    label = f"True IoU against {x.title}, {panel['name']}"
    return scatter_chart(
        label, panel["points"], bins, x, Axis("true IoU"), "There are no detections.", found_iou, diagonal
    )


def _interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    return (low, high) if low is not None and high is not None and defined(low) and defined(high) else None


def offset_intervals(entry: dict[str, Any]) -> Markup:
    """The offset of each edge in pixels, with an interval as wide as the interquartile range."""
    rows = []
    for side, value, spread, clear in zip(_SIDES, entry["pixels"], entry["spread"], entry["clear"], strict=True):
        low = value - spread / 2 if defined(value) and defined(spread) else None
        high = value + spread / 2 if defined(value) and defined(spread) else None
        rows.append(Interval(side, value, low, high, signed_text(value), clear))
    label = "Distance of the edges of detections from those of annotations"
    return interval_chart(label, rows, "detection minus annotation (pixels)", "There are no correct detections.")


def offset_drawing(entry: dict[str, Any]) -> Markup:
    """An annotation, and a detection with the median offset of each edge, exaggerated."""
    return box_offset_drawing(
        "The median detection around its annotation",
        entry["relative"],
        entry["clear"],
        "There are no correct detections.",
    )
