"""Time to read an annotation file of the size of COCO train: parsing, checking, and building arrays.

    python benchmarks/annotations.py

Writes a json of 118,287 images and 860,001 objects with polygons in 80 categories to a temporary folder, and reads it
as a training run does: once without errors, and once with ``on_error=skip`` and an error in every hundredth box.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from cpm_rcnn.data import annotations
from cpm_rcnn.data.settings import OnError

IMAGES, OBJECTS, CATEGORIES = 118_287, 860_001, 80


def content(images: int, objects: int) -> dict[str, list[dict[str, Any]]]:
    """The content of a json file without errors."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(300, 641, (images, 2))
    rows = rng.integers(0, images, objects)
    width, height = (0.05 + 0.4 * rng.random((2, objects))) * sizes[rows].T
    x, y = rng.random((2, objects)) * (sizes[rows].T - (width, height))
    boxes = np.stack([x, y, width, height], axis=1).round(2)
    polygons = np.stack([x, y, x + width, y, x + width, y + height, x, y + height], axis=1).round(2)
    return {
        "images": [
            {"id": 3 * row + 9, "file_name": f"{3 * row + 9:012d}.jpg", "height": height, "width": width}
            for row, (width, height) in enumerate(sizes.tolist())
        ],
        "categories": [{"id": key, "name": f"class {key}"} for key in range(1, CATEGORIES + 1)],
        "annotations": [
            {
                "segmentation": [polygon],
                "area": box[2] * box[3],
                "iscrowd": 0,
                "image_id": 3 * row + 9,
                "bbox": box,
                "category_id": category,
                "id": number + 1,
            }
            for number, (polygon, box, row, category) in enumerate(
                zip(polygons.tolist(), boxes.tolist(), rows.tolist(), rng.integers(1, CATEGORIES + 1, objects).tolist())
            )
        ],
    }


def measure(path: Path, on_error: OnError) -> None:
    """Read ``path`` and print the seconds that each part took."""
    seconds: dict[str, float] = {}

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = work(*arguments)
            seconds[part] = time.perf_counter() - start
            return result

        return run

    with (
        mock.patch.object(annotations, "read_json", timed("parsing", annotations.read_json)),
        mock.patch.object(annotations, "check_json", timed("checking", annotations.check_json)),
    ):
        loaded = timed("all", annotations.CocoAnnotations.load)(path, None, on_error)
    seconds["building"] = seconds.pop("all") - sum(seconds[part] for part in ("parsing", "checking"))
    parts = ", ".join(f"{part} {taken:.2f} s" for part, taken in seconds.items())
    print(f"on_error={on_error}: {parts}; {len(loaded)} images, {len(loaded.labels)} objects")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--objects", type=int, default=OBJECTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        made = content(options.images, options.objects)
        path.write_text(json.dumps(made))
        print(f"{options.images} images, {options.objects} objects, {path.stat().st_size / 1e6:.0f} MB")
        measure(path, "raise")
        for item in made["annotations"][::100]:
            item["bbox"][2] = -1
        path.write_text(json.dumps(made))
        del made
        measure(path, "skip")


if __name__ == "__main__":
    main()
