"""Time and peak memory of an evaluation of the size of COCO val, and the ratios to pycocotools.

    python benchmarks/evaluation.py

Makes 5,000 images with 36,781 objects of 80 classes, some of them crowds, and 100 detections per image, with sparse
ids in random order. Evaluates them in three ways, each in a process of its own:

- ``CocoMetric``: one ``update`` per image with tensors as a detector returns them, then ``compute``;
- ``CocoMetric without hotcoco``: the same where hotcoco is not installed;
- ``pycocotools``: ``loadRes`` of a list of dicts, ``evaluate``, ``accumulate`` and ``summarize``. The list is made and
  the annotation file is read before the clock starts.

Peak memory is what the process needed in addition to what it held before the clock started (Linux only). The script
fails if the twelve metrics and the APs of the classes are not equal to the last bit.

    python benchmarks/evaluation.py --cases 1000

Counts in how many of 1,000 random cases hotcoco's precision, recall and twelve metrics are equal to those of
pycocotools to the last bit, and names the largest difference. Also for ultrafast-pycocotools and faster-coco-eval if
they are installed.

    python benchmarks/evaluation.py --analysis

Time and peak memory of the analysis behind the HTML report, on the same detections.
"""

import argparse
import contextlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.evaluation import coco_metric, engines
from cpm_rcnn.evaluation.analysis.report import analyze
from cpm_rcnn.models.structures import DETAILS

IMAGES, OBJECTS, CATEGORIES, PER_IMAGE = 5_000, 36_781, 80, 100
WAYS = ("CocoMetric", "CocoMetric without hotcoco", "pycocotools")


def content(images: int, objects: int) -> dict[str, list[dict[str, Any]]]:
    """The content of the annotation file."""
    rng = np.random.default_rng(0)
    image_ids = rng.choice(600_000, images, replace=False) + 1
    category_ids = rng.choice(3 * CATEGORIES, CATEGORIES, replace=False) + 1
    # A third of COCO's objects are persons.
    chances = np.r_[0.33, np.full(CATEGORIES - 1, 0.67 / (CATEGORIES - 1))]
    boxes = np.empty((objects, 4))
    boxes[:, 2:] = np.exp(rng.normal(4, 1, (objects, 2))).clip(4, 400)
    boxes[:, :2] = rng.random((objects, 2)) * (640 - boxes[:, 2:])
    boxes = boxes.round(2)
    return {
        "images": [
            {"id": key, "file_name": f"{key:012d}.jpg", "height": 640, "width": 640} for key in image_ids.tolist()
        ],
        "categories": [{"id": key, "name": f"class {key}"} for key in category_ids.tolist()],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for number, (image, category, box, area, crowd) in enumerate(
                zip(
                    image_ids[rng.integers(0, images, objects)].tolist(),
                    category_ids[rng.choice(CATEGORIES, objects, p=chances)].tolist(),
                    boxes.tolist(),
                    (boxes[:, 2] * boxes[:, 3] * rng.uniform(0.4, 1, objects)).tolist(),
                    (rng.random(objects) < 0.012).astype(int).tolist(),
                ),
                start=1,
            )
        ],
    }


def detections(annotations: CocoAnnotations) -> list[dict[str, torch.Tensor]]:
    """100 per image: three near each object with rising scores for better boxes, and others anywhere."""
    rng = np.random.default_rng(1)
    found = []
    for first, end in zip(annotations.offsets[:-1], annotations.offsets[1:]):
        near = np.repeat(np.arange(first, end), 3)[:PER_IMAGE]
        missing = PER_IMAGE - len(near)
        noise = rng.choice([0.02, 0.1, 0.3], len(near))
        boxes = annotations.xywh[near]
        boxes[:, :2] += noise[:, None] * boxes[:, 2:] * rng.normal(0, 0.5, (len(near), 2))
        others = np.c_[rng.random((missing, 2)) * 500, np.exp(rng.normal(4, 1, (missing, 2))).clip(4, 400)]
        boxes = np.r_[boxes, others]
        boxes[:, 2:] += boxes[:, :2]
        labels = np.r_[annotations.labels[near], rng.integers(1, CATEGORIES + 1, missing)]
        scores = np.r_[rng.random(len(near)) * (1 - noise), rng.random(missing) ** 4]
        order = np.argsort(-scores)
        found.append(
            {
                "boxes": torch.tensor(boxes[order], dtype=torch.float32),
                "scores": torch.tensor(scores[order], dtype=torch.float32),
                "labels": torch.tensor(labels[order]),
            }
        )
    return found


Work = Callable[[], list[float]]


def through_metric(annotations: CocoAnnotations, found: list[dict[str, torch.Tensor]]) -> Work:
    """The metrics and the APs of the classes, by ``CocoMetric``."""

    def evaluate() -> list[float]:
        metric = coco_metric.CocoMetric(annotations, annotations.categories)
        for image_id, one in zip(annotations.image_ids.tolist(), found):
            metric.update([image_id], [one])
        metrics = metric.compute()
        return [metrics[name] for name in coco_metric.METRIC_NAMES] + list(metrics["per_class"].values())

    return evaluate


def directly(annotations: CocoAnnotations, found: list[dict[str, torch.Tensor]]) -> Work:
    """The same by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows = [
        {"image_id": image_id, "category_id": annotations.category_ids[label - 1], "bbox": bbox, "score": score}
        for image_id, one in zip(annotations.image_ids.tolist(), found)
        for label, bbox, score in zip(
            one["labels"].tolist(),
            CONTINUOUS.to_xywh(one["boxes"].double()).tolist(),
            one["scores"].tolist(),
        )
    ]
    truth = COCO(str(annotations.path))

    def evaluate() -> list[float]:
        evaluator = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        precision = evaluator.eval["precision"][:, :, :, 0, -1]
        defined = [of_class[of_class > -1] for of_class in precision.transpose(2, 0, 1)]
        return [*evaluator.stats.tolist(), *(float(part.mean()) if part.size else -1.0 for part in defined)]

    return evaluate


def measure(way: str, path: Path, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat, peak memory in MB, and the numbers of one way."""
    annotations = CocoAnnotations.load(path)
    found = detections(annotations)
    work = (directly if way == "pycocotools" else through_metric)(annotations, found)
    without = mock.patch.object(engines, "by_hotcoco", side_effect=ImportError)
    seconds, processor, peaks = [], [], []
    with without if way == WAYS[1] else contextlib.nullcontext():
        for _ in range(repeats):
            before = memory("VmRSS", reset=True)
            start, started = time.perf_counter(), time.process_time()
            numbers = work()
            seconds.append(time.perf_counter() - start)
            processor.append(time.process_time() - started)
            peaks.append(memory("VmHWM") - before)
    return {"seconds": seconds, "processor": processor, "peak": peaks[0], "numbers": numbers}


def measure_analysis(path: Path) -> None:
    """Print time and peak memory of the analysis, without the pictures of the report."""
    annotations = CocoAnnotations.load(path)
    metric = coco_metric.CocoMetric(annotations, annotations.categories, details=True)
    for image_id, one in zip(annotations.image_ids.tolist(), detections(annotations)):
        details = dict.fromkeys(DETAILS, one["scores"].sqrt())
        metric.update([image_id], [one | details])
    metric.compute()
    split, points = metric.evaluated_split(), metric.operating_points(0.9)
    assert split is not None
    assert points is not None
    before, start = memory("VmRSS", reset=True), time.perf_counter()
    report = analyze(split, points)
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
    print(f"analysis: {seconds:.1f} s, peak {peak:.0f} MB, {len(json.dumps(report)) / 1e6:.1f} MB of report.json")


def random_case(seed: int) -> engines.EvaluationData:
    """Up to 30 images and 8 classes, with crowds and areas smaller than the boxes.

    Many cases have equal scores, boxes on a grid (so that IoUs are equal to each other and to thresholds), boxes
    without area, or more than 100 detections per image and class.
    """
    rng = np.random.default_rng(seed)
    images, categories = int(rng.integers(1, 31)), int(rng.integers(1, 9))
    ties, grid, empty = rng.random(3) < (0.5, 0.5, 0.3)
    objects = int(rng.integers(0, 12 * images))
    found = int(rng.integers(0, (250 if rng.random() < 0.2 else 25) * images))

    def boxes(number: int) -> np.ndarray:
        sizes = rng.choice([8, 30, 60, 200], (number, 1)) * rng.uniform(0.5, 1.5, (number, 2))
        return np.c_[rng.integers(0, 400, (number, 2)), sizes]

    def rounded(values: np.ndarray) -> np.ndarray:
        values = np.round(values / 4) * 4 if grid else values
        values[rng.random(len(values)) < 0.05 * empty, 2] = 0
        return values

    truth = rounded(boxes(objects))
    in_images, of_class = rng.integers(1, images + 1, objects), rng.integers(1, categories + 1, objects)
    near = rng.integers(0, objects, int(0.7 * found)) if objects else np.zeros(0, int)
    moved = truth[near] * np.exp(rng.normal(0, 0.1, (len(near), 4)) * (0, 0, 1, 1))
    moved[:, :2] += moved[:, 2:] * rng.normal(0, 1 / 12, (len(near), 2))
    others = found - len(near)
    order = rng.permutation(found)
    labels = np.where(rng.random(len(near)) < 0.8, of_class[near], rng.integers(1, categories + 1, len(near)))
    scores = rng.choice([0.1, 0.2, 0.3, 0.5, 0.9], found) if ties else rng.random(found)
    return engines.EvaluationData(
        images=images,
        categories=categories,
        object_images=in_images,
        object_categories=of_class,
        object_boxes=truth,
        object_areas=truth[:, 2] * truth[:, 3] * np.where(rng.random(objects) < 0.5, 1, rng.uniform(0.4, 1, objects)),
        object_crowds=rng.random(objects) < 0.15,
        found_images=np.r_[in_images[near], rng.integers(1, images + 1, others)][order],
        found_categories=np.r_[labels, rng.integers(1, categories + 1, others)][order],
        found_boxes=rounded(np.r_[moved, boxes(others)].astype(np.float32).astype(np.float64)[order]),
        found_scores=scores.astype(np.float32).astype(np.float64),
    )


def compare(cases: int) -> None:
    """Print in how many random cases each engine is equal to pycocotools."""
    by: dict[str, Callable[[engines.EvaluationData], tuple[np.ndarray, np.ndarray]]] = {"hotcoco": engines.by_hotcoco}
    with contextlib.suppress(ImportError):
        from ultrafast_pycocotools import coco, cocoeval

        by["ultrafast-pycocotools"] = instead_of_pycocotools(coco, cocoeval)
    with contextlib.suppress(ImportError):
        from faster_coco_eval.core import coco, faster_eval_api

        logging.getLogger("faster_coco_eval").setLevel(logging.ERROR)
        by["faster-coco-eval"] = instead_of_pycocotools(coco, SimpleNamespace(COCOeval=faster_eval_api.COCOeval_faster))
    equal: dict[str, list[list[bool]]] = {name: [] for name in by}
    largest = dict.fromkeys(by, 0.0)
    for seed in range(cases):
        data = random_case(seed)
        reference = with_metrics(engines.by_pycocotools(data))
        for name, engine in by.items():
            values = with_metrics(engine(data))
            differences = [float(np.abs(a - b).max()) for a, b in zip(values, reference)]
            equal[name].append([difference == 0 for difference in differences])
            largest[name] = max(largest[name], *differences)
    print(f"{cases} random cases; precision, recall and metrics equal to pycocotools':")
    for name, outcomes in equal.items():
        counts = np.sum(outcomes, axis=0)
        print(f"{name}: {counts[0]}, {counts[1]}, {counts[2]}; largest difference {largest[name]:.1e}")


def with_metrics(curves: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    return *curves, np.array(engines.summarize(*curves))


def instead_of_pycocotools(coco: Any, cocoeval: Any) -> Callable[[engines.EvaluationData], Any]:
    """``engines.by_pycocotools`` with the classes ``COCO`` and ``COCOeval`` of other modules."""

    def evaluate(data: engines.EvaluationData) -> Any:
        with mock.patch.dict(sys.modules, {"pycocotools.coco": coco, "pycocotools.cocoeval": cocoeval}):
            return engines.by_pycocotools(data)

    return evaluate


def memory(field: str, reset: bool = False) -> float:
    """A field of this process's status in MB; NaN where there is none. ``reset`` starts a new peak (VmHWM)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--objects", type=int, default=OBJECTS)
    parser.add_argument("--repeats", type=int, default=3, help="of CocoMetric; the others run once")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, help="compare the engines on that many random cases instead")
    parser.add_argument("--analysis", action="store_true", help="measure the analysis behind the report instead")
    options = parser.parse_args()
    if options.cases:
        compare(options.cases)
        return
    if options.way:
        with contextlib.redirect_stdout(sys.stderr):
            measured = measure(options.way, options.path, options.repeats)
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        path.write_text(json.dumps(content(options.images, options.objects)))
        print(
            f"{options.images} images, {options.objects} objects, {CATEGORIES} classes, "
            f"{options.images * PER_IMAGE} detections"
        )
        if options.analysis:
            measure_analysis(path)
            return
        outcomes = {}
        for way in WAYS:
            repeats = options.repeats if way == WAYS[0] else 1
            command = [sys.executable, __file__, "--way", way, "--path", str(path), "--repeats", str(repeats)]
            outcomes[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    reference = outcomes["pycocotools"]
    for way, outcome in outcomes.items():
        assert outcome["numbers"] == reference["numbers"], f"{way} has other numbers than pycocotools"
        # The slowest repeat, so that the ratio is not that of the best of several.
        times = reference["seconds"][0] / max(outcome["seconds"])
        seconds = ", ".join(f"{each:.2f}" for each in outcome["seconds"])
        print(f"{way}: {seconds} s, of processor time {max(outcome['processor']):.2f} s; peak {outcome['peak']:.0f} MB")
        print(f"  pycocotools: {times:.1f} times as long, {reference['peak'] / outcome['peak']:.1f} times the memory")
    print(f"{len(reference['numbers'])} equal numbers; AP {reference['numbers'][0]}")


if __name__ == "__main__":
    main()
