"""How long the checks of annotations take that a training runs before its first step.

    python benchmarks/data_check.py

Uses random annotations as many as those of COCO's train2017 and val2017. Prints the median of several runs.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.data import CocoAnnotations, DataSettings
from cpm_rcnn.data.doctor.anchors import Anchors
from cpm_rcnn.data.doctor.checked_split import CheckedSplit
from cpm_rcnn.data.doctor.examination import examine_annotations
from cpm_rcnn.models.fpn import STRIDES
from cpm_rcnn.models.rpn import RATIOS

CLASSES = 80


def random_annotations(images: int, objects: int, rng: np.random.Generator) -> CocoAnnotations:
    """Objects of log-normal sizes at random places in images of many different sizes."""
    sizes = rng.integers(300, 641, (images, 2))
    rows = np.sort(rng.integers(0, images, objects))
    limits = sizes[rows][:, ::-1]
    side, ratio = np.exp(rng.normal(4, 1, objects)), np.exp(rng.normal(0, 0.4, objects))
    wh = np.minimum(np.stack([side * ratio, side / ratio], axis=1), limits)
    xywh = np.concatenate([rng.random((objects, 2)) * (limits - wh), wh], axis=1)
    return CocoAnnotations(
        path=Path("random.json"),
        is_json=True,
        image_ids=np.arange(images),
        file_names=np.array([f"{number:012d}.jpg" for number in range(images)]),
        heights=sizes[:, 0],
        widths=sizes[:, 1],
        category_ids=list(range(1, CLASSES + 1)),
        category_names=[f"class {number}" for number in range(CLASSES)],
        listed=np.ones(CLASSES, dtype=bool),
        has_annotations=True,
        offsets=np.searchsorted(rows, np.arange(images + 1)),
        labels=rng.integers(1, CLASSES + 1, objects),
        xywh=xywh,
        areas=wh.prod(axis=1),
        crowds=np.zeros(objects, dtype=bool),
        usable=np.ones(objects, dtype=bool),
        numbers=np.arange(objects),
        number_format="annotation {}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    train, val = random_annotations(118_287, 860_001, rng), random_annotations(5_000, 36_781, rng)
    anchors = Anchors((32, 64, 128, 256, 512), STRIDES, RATIOS, CONTINUOUS, ignore_border=True)
    settings = DataSettings()
    seconds = []
    for _ in range(arguments.runs):
        start = time.perf_counter()
        splits = [CheckedSplit.of("train", train, settings), CheckedSplit.of("val", val, settings)]
        findings = examine_annotations(splits, anchors)
        seconds.append(time.perf_counter() - start)
    total = len(train.labels) + len(val.labels)
    print(f"{len(train) + len(val)} images, {total} objects: {statistics.median(seconds):.2f} s", end="")
    print(f" ({min(seconds):.2f} to {max(seconds):.2f}), {len(findings)} findings")


if __name__ == "__main__":
    main()
