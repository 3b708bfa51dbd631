"""What a reader of the report should look at first, as sentences."""

from itertools import pairwise
from typing import Any

import numpy as np

from cpm_rcnn.evaluation.analysis.labels import DUPLICATE_LABEL, NEVER_DETECTED, NOT_ANNOTATED, OTHER_CLASS
from cpm_rcnn.evaluation.analysis.offsets import ALL

# Two classes look like one if each is detected as the other in this share of its detected objects.
_CONFUSED, _FEWEST = 0.25, 10
# The smallest shift and change in size that is reported, and the share of an object's side that is a warning.
_PIXELS, _LARGE_OFFSET = 0.5, 0.05
_UNCALIBRATED = 0.1


def findings(report: dict[str, Any]) -> list[dict[str, str]]:
    """Sentences about the sections of a report: dicts of ``level`` (``warning`` or ``note``), ``text``, ``section``."""
    parts = (_labels, _confusions, _offsets, _classes, _errors, _scores, _calibration)
    found = [finding for part in parts for finding in part(report)]
    return sorted(found, key=lambda finding: finding["level"] != "warning")


def _finding(level: str, section: str, text: str) -> dict[str, str]:
    return {"level": level, "text": text, "section": section}


def _labels(report: dict[str, Any]) -> list[dict[str, str]]:
    counts = report["labels"]["counts"]
    texts = {
        OTHER_CLASS: "{} contradicted by a confident detection of another class",
        DUPLICATE_LABEL: "{} of an object that is annotated twice",
        NOT_ANNOTATED: "{} missing where there is a confident detection",
        NEVER_DETECTED: "{} that no detection reaches",
    }
    parts = [text.format(counts[kind]) for kind, text in texts.items() if counts[kind]]
    if not parts:
        return []
    level = "warning" if counts[OTHER_CLASS] or counts[DUPLICATE_LABEL] else "note"
    return [_finding(level, "labels", f"Annotations to check: {', '.join(parts)}.")]


def _confusions(report: dict[str, Any]) -> list[dict[str, str]]:
    if report["confusion"] is None:
        return []
    names = report["confusion"]["classes"][:-1]
    counts = np.array(report["confusion"]["counts"], dtype=float).reshape(len(names) + 1, -1)[:-1, :-1]
    totals = counts.sum(axis=1)
    shares = counts / np.maximum(totals, 1)[:, None]
    enough = (totals[:, None] >= _FEWEST) & (totals >= _FEWEST)
    both = np.triu((shares >= _CONFUSED) & (shares.T >= _CONFUSED) & enough, k=1)
    one = (shares >= _CONFUSED) & (totals >= _FEWEST)[:, None] & ~both & ~both.T & ~np.eye(len(names), dtype=bool)
    found = []
    for i, j in np.argwhere(both).tolist():
        text = (
            f"{names[i]} and {names[j]} are confused in both directions ({_percent(shares[i, j])} and "
            f"{_percent(shares[j, i])} of their detected objects): are they the same class?"
        )
        found.append(_finding("warning", "confusion", text))
    for i, j in np.argwhere(one).tolist():
        text = f"{_percent(shares[i, j])} of the detected objects of {names[i]} are detected as {names[j]}."
        found.append(_finding("warning", "confusion", text))
    return found


def _offsets(report: dict[str, Any]) -> list[dict[str, str]]:
    classes = [] if report["offsets"] is None else report["offsets"]["classes"]
    texts = [(each, text) for each in classes if (text := _offset_text(each))]
    if texts and texts[0][0]["name"] == ALL:
        # The same offset is not repeated for each class.
        texts = texts[:1]
    found = []
    for each, text in texts:
        name = "" if each["name"] == ALL else f" of {each['name']}"
        sentence = f"Detections{name} {text} their annotations (median of {each['count']} correct detections)"
        # An unfinished detector has small offsets, too.
        if max(map(abs, each["relative"])) >= _LARGE_OFFSET:
            sentence += ": do the annotations have an offset, or another box convention?"
            found.append(_finding("warning", "offsets", sentence))
        else:
            found.append(_finding("note", "offsets", f"{sentence}."))
    return found


def _offset_text(entry: dict[str, Any]) -> str:
    left, top, right, bottom = (
        value if clear else 0.0 for value, clear in zip(entry["pixels"], entry["clear"], strict=True)
    )
    parts = []
    for low, high, names, sizes in (
        (left, right, ("to the left of", "to the right of"), ("narrower than", "wider than")),
        (top, bottom, ("above", "below"), ("shorter than", "taller than")),
    ):
        shift, growth = (low + high) / 2, high - low
        if abs(shift) >= _PIXELS:
            parts.append(f"lie {abs(shift):.1f} px {names[shift > 0]}")
        if abs(growth) >= _PIXELS:
            parts.append(f"are {abs(growth):.1f} px {sizes[growth > 0]}")
    return " and ".join(parts)


def _classes(report: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    absent = [each["name"] for each in report["classes"] if not each["objects"]]
    if absent:
        found.append(_finding("note", "classes", f"No object in the split: {_listed(absent)}."))
    failed = [each["name"] for each in report["classes"] if each["objects"] and each["AP50"] == 0]
    if failed:
        found.append(_finding("warning", "classes", f"Not a single object is detected: {_listed(failed)}."))
    return found


def _errors(report: dict[str, Any]) -> list[dict[str, str]]:
    types = [] if report["errors"] is None else report["errors"]["types"]
    largest = max(types, key=lambda each: each["delta_ap"], default=None)
    if largest is None or largest["delta_ap"] <= 0:
        return []
    gain = f"{100 * largest['delta_ap']:.1f}"
    text = (
        f"The largest loss of AP50 is due to errors of the kind '{largest['name']}' ({largest['text']}): {gain} points."
    )
    return [_finding("note", "errors", text)]


def _scores(report: dict[str, Any]) -> list[dict[str, str]]:
    stages = report["scores"]["stages"]
    found = []
    for before, after in pairwise(stages):
        first, second = (each["rank_correlation"]["found"] for each in (before, after))
        if np.isnan(first) or np.isnan(second):
            continue
        change = f"{100 * (after['AP'] - before['AP']):+.1f}"
        text = (
            f"{after['name']} changes the rank correlation of score and IoU of detected objects from {first:.2f} to "
            f"{second:.2f}, and AP by {change} points."
        )
        found.append(_finding("note", "scores", text))
    return found


def _calibration(report: dict[str, Any]) -> list[dict[str, str]]:
    if report["calibration"] is None or not report["calibration"]["ece"] > _UNCALIBRATED:
        return []
    bins = report["calibration"]["bins"]
    gap = sum(each["count"] * (each["score"] - each["precision"]) for each in bins)
    direction = "higher" if gap > 0 else "lower"
    text = (
        f"Scores are {direction} than the share of correct detections "
        f"(expected calibration error {_percent(report['calibration']['ece'])})."
    )
    return [_finding("note", "calibration", text)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _listed(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
