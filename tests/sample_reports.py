"""Contents of ``report.json``, with images, and the result of a data check, for the tests of the pages."""

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cpm_rcnn.data.doctor.examination import Examination
from cpm_rcnn.data.doctor.finding import Example, Finding
from cpm_rcnn.errors import UserError

NAN = math.nan
NAMES = ["person", "bicycle", "car", "dog", "traffic light", "bottle"]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KINDS = ("correct", "classification", "localization", "both", "duplicate", "background", "missed")
SIZES = ((640, 480), (480, 640), (1200, 500), (300, 300), (97, 61))


def _shapes(rng: np.random.Generator, width: int, height: int) -> list[list[float]]:
    boxes = []
    for _ in range(int(rng.integers(2, 6))):
        w, h = width * rng.uniform(0.12, 0.4), height * rng.uniform(0.15, 0.45)
        boxes.append([rng.uniform(0, width - w), rng.uniform(0, height - h), w, h])
    return boxes


def _file_name(number: int, name: str = "street") -> str:
    return f"{name}/{number:06d}.jpg"


def open_image(file_name: str) -> np.ndarray:
    """A drawing with the objects of an image; the image with number 3 cannot be read."""
    number = int(file_name.rpartition("/")[2].split(".")[0])
    if number == 3:
        raise UserError(f"{file_name} not found")
    width, height = SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    top, bottom = rng.integers(90, 230, 3), rng.integers(60, 160, 3)
    ramp = np.linspace(0, 1, height)[:, None, None]
    pixels = np.broadcast_to((1 - ramp) * top + ramp * bottom, (height, width, 3)).astype(np.uint8)
    canvas = Image.fromarray(pixels.copy())
    pen = ImageDraw.Draw(canvas)
    for k, (x, y, w, h) in enumerate(_shapes(np.random.default_rng(100 + number), width, height)):
        color = tuple(int(each) for each in rng.integers(0, 255, 3))
        (pen.ellipse if k % 2 else pen.rectangle)((x, y, x + w, y + h), fill=color)
    return np.asarray(canvas)


def _bins(rng: np.random.Generator, noise: float) -> list[dict[str, Any]]:
    bins = []
    for k in range(10):
        if k == 8:
            continue  # an empty bin
        mean = min(0.97, max(0.03, 0.15 + 0.075 * k + rng.normal(0, noise / 6)))
        ends = {"iou_low": max(0.0, mean - noise), "iou_high": min(1.0, mean + noise)}
        bins.append({"low": k / 10, "high": (k + 1) / 10, "count": int(4000 / (k + 1) ** 2), "iou_mean": mean, **ends})
    return bins


def _panel(rng: np.random.Generator, name: str, noise: float, correlation: float, ap: float | None) -> dict[str, Any]:
    scores = np.clip(rng.beta(0.7, 1.4, 400), 0, 1)
    ious = np.clip(0.12 + 0.8 * scores + rng.normal(0, noise, 400), 0, 1)
    panel = {
        "name": name,
        "rank_correlation": {"all": correlation, "found": correlation - 0.17},
        "points": np.stack([scores, ious], axis=1).tolist(),
        "bins": _bins(rng, noise),
    }
    return panel if ap is None else panel | {"AP": ap, "AP50": ap + 0.19, "AP75": ap + 0.03}


def _series(rng: np.random.Generator, name: str, empty: bool = False) -> dict[str, Any]:
    recalls = thresholds = np.linspace(0, 1, 101)
    end = rng.uniform(0.5, 0.9)
    precision = {}
    for key, factor in (("0.50", 1.0), ("0.75", 0.7), ("0.50:0.95", 0.55)):
        values = np.where(recalls < end * factor, 1 - (recalls / (end * factor)) ** 3, 0.0)
        precision[key] = [NAN] * 101 if empty else values.tolist()
    recall = end * (1 - thresholds**2)
    exact = 0.35 + 0.6 * thresholds
    exact[97:] = NAN
    f1 = 2 * exact * recall / (exact + recall)
    curves = {"f1": f1, "precision_at": exact, "recall_at": recall}
    return {"name": name, "precision": precision} | {
        key: [NAN] * 101 if empty else values.tolist() for key, values in curves.items()
    }


def _confusion(names: list[str], rng: np.random.Generator) -> dict[str, Any]:
    number = len(names) + 1
    counts = rng.integers(0, 9, (number, number))
    counts[np.arange(number), np.arange(number)] = rng.integers(60, 300, number)
    counts[-1, -1] = 0
    return {"threshold": 0.41, "classes": [*names, "background"], "counts": counts.tolist()}


def _image(number: int, names: list[str]) -> dict[str, Any]:
    width, height = SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    items = []
    for k, box in enumerate(_shapes(np.random.default_rng(100 + number), width, height)):
        kind = KINDS[(number + k) % len(KINDS)]
        missed = kind == "missed"
        moved = box if missed else (np.array(box) + rng.normal(0, 0.03, 4) * (width + height) / 2).tolist()
        moved[2:] = [max(each, 4.0) for each in moved[2:]]
        other = names[(k + 1) % len(names)] if kind in ("classification", "both") else None
        score, iou = (None, None) if missed else (float(rng.uniform(0.3, 1)), float(rng.uniform(0, 1)))
        items.append(
            {"kind": kind, "class": names[(number + k) % len(names)], "score": score, "iou": iou, "other": other}
            | {"box": moved}
        )
    kinds = [item["kind"] for item in items]
    return {
        "id": number,
        "file_name": _file_name(number),
        "width": width,
        "height": height,
        "cost": 0.004 / number - 0.0004,
        "counts": {kind: kinds.count(kind) for kind in KINDS},
        "items": items,
    }


def _label(number: int, names: list[str]) -> dict[str, Any]:
    width, height = SIZES[number % len(SIZES)]
    box = _shapes(np.random.default_rng(100 + number), width, height)[0]
    beside = [box[0] + 3, box[1] - 2, box[2] * 0.95, box[3] * 1.04]
    kind = ("other_class", "not_annotated", "duplicate", "never_detected")[number % 4]
    name, annotated = names[number % len(names)], names[(number + 1) % len(names)]
    entry = {
        "other_class": (name, 0.93, beside, annotated, box, f"annotated as {annotated}, detected as {name}"),
        "not_annotated": (name, 0.88, beside, None, None, f"detected as {name}; nothing is annotated there"),
        "duplicate": (None, None, beside, annotated, box, f"annotated twice, as {annotated} (IoU 0.91)"),
        "never_detected": (None, None, box, annotated, box, f"annotated as {annotated}; nothing is detected there"),
    }[kind]
    keys = ("class", "score", "box", "annotated", "annotated_box", "text")
    return {
        "image_id": number,
        "file_name": _file_name(number),
        "width": width,
        "height": height,
        "kind": kind,
        "annotation_id": None if annotated is None else 1000 + number,
        **dict(zip(keys, entry, strict=True)),
    }


def rich_report(names: list[str] = NAMES, images: int = 12, labels: int = 16) -> dict[str, Any]:
    """A report with all sections and some undefined values."""
    rng = np.random.default_rng(0)
    metrics = dict(zip(METRICS, (0.412, 0.606, 0.447, NAN, 0.452, 0.531, 0.335, 0.52, 0.541, NAN, 0.58, 0.69)))
    classes, points = [], {}
    for k, name in enumerate(names):
        ap = float(rng.uniform(0.05, 0.7))
        values = {"AP": ap, "AP50": min(1, ap + 0.2), "AP75": ap + 0.02, "APs": NAN if k % 3 else ap / 2}
        values |= {"APm": ap, "APl": ap + 0.1, "AR100": ap + 0.13}
        row = {"name": name, "id": k + 1, "objects": int(rng.integers(1, 9000)), "detections": 300 * k, **values}
        if k == 4:
            row |= {"objects": 0} | dict.fromkeys(values, NAN)
        classes.append(row)
        best = {"threshold": 0.3 + 0.3 * ap, "precision": 0.7, "recall": ap, "f1": 0.6}
        strict = {"threshold": 0.9, "precision": 0.9, "recall": ap / 2, "f1": 0.5} if k % 2 else None
        points[name] = {"id": k + 1, "objects": row["objects"], "best_f1": best if row["objects"] else None}
        points[name]["precision"] = strict
    errors = zip(
        ("classification", "localization", "both", "duplicate", "background", "missed"),
        (0.021, 0.093, 0.004, 0.0, 0.034, 0.117),
        (412, 1893, 77, 0, 655, 2310),
        (
            "the right place (IoU 0.5 or more), but another class",
            "the right class, but IoU 0.1 to 0.5",
            "another class, and IoU 0.1 to 0.5",
            "a second detection of an object",
            "IoU below 0.1 with every object",
            "an object that no detection explains",
        ),
    )
    reliability = [
        {"low": k / 10, "high": (k + 1) / 10, "score": k / 10 + 0.05, "precision": NAN if k == 1 else (k / 10) ** 1.4}
        | {"count": 0 if k == 1 else int(3000 / (k + 1))}
        for k in range(10)
    ]
    offsets = [
        {
            "name": name,
            "count": 900 - 3 * k,
            "pixels": [-0.2, 0.1, 1.4, -0.9],
            "relative": [-0.002, 0.001, 0.021, -0.012],
        }
        | {"spread": [2.4, 2.1, 3.3, 2.8], "clear": [False, False, True, k == 0]}
        for k, name in enumerate(["all", *names])
    ]
    return {
        "title": "CPM R-CNN R-50 on street scenes",
        "description": [
            ["checkpoint", "outputs/street/checkpoints/best.ckpt"],
            ["head", "cpm: CMM, ISM, RSM"],
            ["backbone", "resnet50"],
            ["annotations", "data/street/val.json"],
            ["images", "2,314"],
            ["objects", "14,820"],
            ["detections", "121,077"],
        ],
        "findings": [
            {
                "level": "warning",
                "text": "38 objects look as if they were not annotated; confident detections have no annotation there.",
                "section": "labels",
            },
            {
                "level": "warning",
                "text": "Right edges of detections are 1.4 pixels further right than those of annotations.",
                "section": "offsets",
            },
            {"level": "note", "text": "Missed objects cost most: 11.7 points of AP50.", "section": "errors"},
            {
                "level": "note",
                "text": "ISM raises the rank correlation of score and IoU from 0.41 to 0.58.",
                "section": "scores",
            },
        ],
        "metrics": metrics,
        "classes": classes,
        "sizes": [
            {"name": "small", "objects": 0, "AP": NAN, "AR": NAN},
            {"name": "medium", "objects": 5031, "AP": 0.452, "AR": 0.58},
            {"name": "large", "objects": 9789, "AP": 0.531, "AR": 0.69},
        ],
        "curves": {
            "recalls": np.linspace(0, 1, 101).tolist(),
            "thresholds": np.linspace(0, 1, 101).tolist(),
            "series": [_series(rng, "mean"), *(_series(rng, name, empty=k == 4) for k, name in enumerate(names))],
        },
        "operating_points": {"iou": 0.5, "target_precision": 0.9, "classes": points},
        "confusion": _confusion(names, rng),
        "errors": {
            "ap50": 0.606,
            "types": [{"name": a, "delta_ap": b, "count": c, "text": d} for a, b, c, d in errors],
        },
        "calibration": {"ece": 0.083, "bins": reliability},
        "scores": {
            "found_iou": 0.5,
            "stages": [
                _panel(rng, "classification", 0.24, 0.41, 0.379),
                _panel(rng, "ISM", 0.15, 0.58, 0.401),
                _panel(rng, "RSM", 0.11, 0.67, 0.412),
            ],
            "predicted_iou": _panel(rng, "predicted IoU", 0.1, 0.72, None),
        },
        "offsets": {"found_iou": 0.5, "classes": offsets},
        "images": {"iou": 0.5, "threshold": None, "list": [_image(k, names) for k in range(1, images + 1)]},
        "labels": {"count": 54, "list": [_label(k, names) for k in range(1, labels + 1)]},
        "missing": {},
    }


def minimal_report() -> dict[str, Any]:
    """The report of a detector without detections on one class; most sections are missing."""
    undefined = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"), NAN)
    nothing = {"precision": {key: [NAN] * 101 for key in ("0.50", "0.75", "0.50:0.95")}}
    nothing |= {key: [None] * 101 for key in ("f1", "precision_at", "recall_at")}
    grid = np.linspace(0, 1, 101).tolist()
    stage = {"name": "score", "rank_correlation": {"all": NAN, "found": NAN}, "points": [], "bins": []}
    return {
        "title": "No detections",
        "description": [],
        "findings": [],
        "metrics": dict.fromkeys(METRICS, NAN),
        "classes": [{"name": "cat", "id": 1, "objects": 0, "detections": 0, **undefined}],
        "sizes": [{"name": name, "objects": 0, "AP": NAN, "AR": None} for name in ("small", "medium", "large")],
        "curves": {
            "recalls": grid,
            "thresholds": grid,
            "series": [{"name": "mean", **nothing}, {"name": "cat", **nothing}],
        },
        "operating_points": {
            "iou": 0.5,
            "target_precision": None,
            "classes": {"cat": {"id": 1, "objects": 0, "best_f1": None, "precision": None}},
        },
        "confusion": {"classes": ["cat", "background"], "counts": [[0, 0], [0, 0]]},
        "errors": None,
        "calibration": {"ece": NAN, "bins": []},
        "scores": {"found_iou": 0.5, "stages": [stage | {"AP": NAN, "AP50": NAN, "AP75": NAN}], "predicted_iou": None},
        "offsets": None,
        "images": {"iou": 0.5, "threshold": None, "list": []},
        "labels": {"count": 0, "list": []},
        "missing": {"errors": "hotcoco is not installed; pip install hotcoco"},
    }


def awkward_examination(name: str = "[red]a.jpg") -> Examination:
    """The result of a check with a fault of an annotation file, and images of one name in two splits."""
    boxes = ((5.0, 6.0, 3.0, 4.0),)
    examples = tuple(
        Example(split, name, "annotation 7", "3 x 4 pixels", (640, 480), boxes, whole=split == "val")
        for split in ("train", "val")
    )
    long = "a" * 200
    findings = [
        Finding("fault", "invalid annotations", f"1 image {long}.", 1, (Example("train", f"{long}.json", "image 1"),)),
        Finding("warning", "anchors", "Sizes.", 9, examples, "Or else.", "detector.anchor_sizes=[8,16,32,64,128]"),
    ]
    counts = {"images": 3, "objects": 4, "crowds": 0, "without_objects": 1, "annotated": True}
    splits = [{"name": split, "annotations": f"{long}.json", **counts} for split in ("train", "val")]
    classes = [{"id": 1, "name": name, "objects": {"train": 3, "val": 1}}]
    return Examination(findings, splits, classes, None)
