"""Time to read an annotation file of the size of COCO train, and to check that its images exist.

    python benchmarks/annotations.py

Writes a json of 118,287 images and 860,001 objects with polygons in 80 categories to a temporary folder, and reads it
as a training run does: once without errors, and once with ``on_error=skip`` and an error in every hundredth box. Then
writes that many small JPEGs into one folder, into 1,000 folders, and into a zip archive of the one folder, and looks
for them: all there, one in a hundred missing, and with their headers (``check_images=true``). The files were just
written, so the file system's cache has them.
"""

import argparse
import io
import json
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from cpm_rcnn.data import ImageSource, annotations, raw
from cpm_rcnn.data.file_check import check_image_files
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
        mock.patch.object(raw, "read_json", timed("parsing", raw.read_json)),
        mock.patch.object(annotations, "check_json", timed("checking", annotations.check_json)),
    ):
        loaded = timed("all", annotations.CocoAnnotations.load)(path, None, on_error)
    seconds["building"] = seconds.pop("all") - sum(seconds[part] for part in ("parsing", "checking"))
    parts = ", ".join(f"{part} {taken:.2f} s" for part, taken in seconds.items())
    print(f"on_error={on_error}: {parts}; {len(loaded)} images, {len(loaded.labels)} objects")


def measure_files(folder: Path, images: int) -> None:
    """Check ``images`` files in several layouts and print the seconds."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "JPEG")
    flat = [f"{number:012d}.jpg" for number in range(images)]
    nested = [f"{number % 1000:03d}/{name}" for number, name in enumerate(flat)]
    for parent in {Path(name).parent for name in nested}:
        (folder / "nested" / parent).mkdir(parents=True)
    (folder / "flat").mkdir()
    for layout, names in (("flat", flat), ("nested", nested)):
        for name in names:
            (folder / layout / name).write_bytes(file.getvalue())
    with zipfile.ZipFile(folder / "zipped.zip", "w") as archive:
        for name in flat:
            archive.writestr(f"zipped/{name}", file.getvalue())
    for layout, names in (("flat", flat), ("nested", nested), ("zipped", flat)):
        listing = _listing(names)
        rows = np.arange(images)
        seconds = [_check_time(listing, rows, folder / layout)]
        for row in range(0, images, 100):
            listing.file_names[row] = f"missing/{row}.jpg"
        seconds.append(_check_time(listing, rows, folder / layout, missing=len(range(0, images, 100))))
        seconds.append(_check_time(_listing(names), rows, folder / layout, headers=True))
        print(f"{layout}: all there {seconds[0]:.2f} s, 1% missing {seconds[1]:.2f} s, headers {seconds[2]:.1f} s")


def _listing(names: list[str]) -> Any:
    """What the check needs of a json with these file names."""
    return SimpleNamespace(
        path=Path("instances.json"),
        file_names=np.array(names),
        heights=np.full(len(names), 48),
        widths=np.full(len(names), 64),
    )


def _check_time(listing: Any, rows: np.ndarray, folder: Path, headers: bool = False, missing: int = 0) -> float:
    start = time.perf_counter()
    problems = check_image_files(listing, rows, ImageSource(folder), headers, progress=False)
    assert len(problems) == missing
    return time.perf_counter() - start


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
        measure_files(Path(folder), options.images)


if __name__ == "__main__":
    main()
