"""The page of a report."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpm_rcnn.reporting.report import figures
from cpm_rcnn.reporting.report.charts import defined
from cpm_rcnn.reporting.report.embedding import OpenImage, crop_view, embed, whole_view
from cpm_rcnn.reporting.report.template import render, write_page
from cpm_rcnn.reporting.tables import write_metrics

JSON, HTML = "report.json", "report.html"

SECTIONS = {
    "summary": "Summary",
    "scores": "Scores and box quality",
    "classes": "Classes",
    "sizes": "Object sizes",
    "curves": "Precision and recall",
    "operating_points": "Score thresholds",
    "errors": "Errors",
    "confusion": "Confusion matrix",
    "calibration": "Calibration",
    "offsets": "Box offsets",
    "images": "Images that cost most",
    "labels": "Labels to check",
}
# In the navigation.
SHORT_NAMES = {
    "scores": "Scores",
    "sizes": "Sizes",
    "curves": "Curves",
    "operating_points": "Thresholds",
    "confusion": "Confusion",
    "offsets": "Offsets",
    "images": "Images",
    "labels": "Labels",
}
# Kinds of boxes in images, in the order of the filter.
BOX_KINDS = {
    "correct": "correct",
    "classification": "wrong class",
    "localization": "poor box",
    "both": "wrong class and poor box",
    "duplicate": "duplicate",
    "background": "background",
    "missed": "missed object",
    "ignored": "ignored",
}
LABEL_KINDS = {
    "not_annotated": "not annotated",
    "other_class": "other class",
    "duplicate": "annotated twice",
    "never_detected": "never detected",
}


def report_page(report: dict[str, Any], open_image: OpenImage | None) -> str:
    """The report as one page of HTML, which needs no other file and makes no request.

    Args:
        report: the content of ``report.json``. Undefined values may be NaN or None. A section that is None is replaced
            by the reason in ``missing``.
        open_image: returns the image of a ``file_name`` as uint8 RGB (H, W, 3), or raises ``UserError``, whose message
            is then shown in its place. None embeds no pictures.
    """
    return render(
        "page.html",
        report={"findings": [], "metrics": None} | dict.fromkeys(SECTIONS) | report,
        description=report.get("description") or [],
        title=report.get("title") or "Evaluation",
        sections=SECTIONS,
        short_names=SHORT_NAMES,
        figures=figures,
        present={key: bool(report.get("metrics" if key == "summary" else key)) for key in SECTIONS},
        reasons={key: _reason(report, key) for key in SECTIONS},
        box_kinds=BOX_KINDS,
        label_kinds=LABEL_KINDS,
        stages=_stages(report.get("scores")),
        images=_images(report.get("images"), open_image),
        labels=_labels(report.get("labels"), open_image),
    )


def write_report(report: dict[str, Any], folder: Path, open_image: OpenImage | None) -> None:
    """Write ``report.json``, where undefined values are null, and ``report.html`` to a folder.

    Args:
        report: see :func:`report_page`.
        folder: the folder; it is created if it is missing.
        open_image: see :func:`report_page`.

    Raises:
        UserError: a file cannot be written.
    """
    write_metrics(report, folder / JSON)
    write_page(report_page(report, open_image), folder / HTML)


def _reason(report: dict[str, Any], key: str) -> str:
    reason = (report.get("missing") or {}).get(key) or "there is nothing to show"
    return f"Not available: {reason.rstrip('.')}."


def _stages(scores: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The stages of the scores, each with its change in rank correlation and AP against the stage before."""
    stages: list[dict[str, Any]] = []
    for stage in scores["stages"] if scores else []:
        gains = {}
        if stages:
            old, new = stages[-1], stage
            for key in ("AP", "AP50", "AP75"):
                gains[key] = _difference(new.get(key), old.get(key))
            for key in ("all", "found"):
                gains[key] = _difference(new["rank_correlation"][key], old["rank_correlation"][key])
        stages.append(stage | {"gains": gains})
    return stages


def _difference(new: float | None, old: float | None) -> float | None:
    return new - old if new is not None and old is not None else None


def _images(section: dict[str, Any] | None, open_image: OpenImage | None) -> dict[str, Any]:
    """Pictures and filters of the images."""
    entries = section["list"] if section else []
    items = [item for entry in entries for item in entry["items"]]
    return {
        "pictures": embed(entries, map(whole_view, entries), open_image),
        "classes": _choices(item["class"] for item in items),
        "kinds": _kinds(BOX_KINDS, (item["kind"] for item in items)),
    }


def _labels(section: dict[str, Any] | None, open_image: OpenImage | None) -> dict[str, Any]:
    """Pictures, boxes and filters of the suspicious labels.

    A box is a dict of ``box``, ``role`` (``detection`` or ``annotation``) and ``title``.
    """
    entries = section["list"] if section else []
    boxes = []
    for entry in entries:
        detected = defined(entry["score"])
        annotated = entry["annotated"] or "object"
        drawn = []
        if entry.get("annotated_box"):
            drawn.append({"box": entry["annotated_box"], "role": "annotation", "title": f"annotated: {annotated}"})
        if detected:
            title = f"detected: {entry['class']}, score {entry['score']:.2f}"
            drawn.append({"box": entry["box"], "role": "detection", "title": title})
        elif entry["box"] != entry.get("annotated_box"):
            title = f"annotated: {entry['class'] or annotated}"
            drawn.append({"box": entry["box"], "role": "annotation", "title": title})
        boxes.append(drawn)
    views = [crop_view(entry, [each["box"] for each in drawn]) for entry, drawn in zip(entries, boxes)]
    return {
        "pictures": embed(entries, views, open_image),
        "boxes": boxes,
        "classes": _choices(name for entry in entries for name in {entry["class"], entry["annotated"]}),
        "kinds": _kinds(LABEL_KINDS, (entry["kind"] for entry in entries)),
    }


def _choices(names: Any) -> list[tuple[str, int]]:
    """Names with how often they occur, in alphabetical order."""
    return sorted(Counter(name for name in names if name is not None).items(), key=lambda pair: pair[0].lower())


def _kinds(names: dict[str, str], kinds: Any) -> list[tuple[str, str, int]]:
    """Kind, name and how often it occurs."""
    counts = Counter(kinds)
    order: Sequence[str] = [kind for kind in names if kind in counts]
    return [(kind, names.get(kind, kind), counts[kind]) for kind in [*order, *(k for k in counts if k not in names)]]
