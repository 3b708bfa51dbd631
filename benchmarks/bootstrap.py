"""Time of the bootstrap that ``compare`` uses, for one run.

    python benchmarks/bootstrap.py                              # the size of COCO val, as in benchmarks/evaluation.py
    python benchmarks/bootstrap.py --images 200 --objects 1500

Prints the seconds of the matching and of the resamples. The script fails if the estimate without resampling differs
from ``CocoMetric`` by more than 1e-12.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.evaluation.bootstrap import (
    AP_METRICS,
    ap_metrics,
    average_precisions,
    match_all,
    resample_weights,
)
from cpm_rcnn.evaluation.coco_metric import CocoMetric, evaluation_data
from evaluation import CATEGORIES, IMAGES, OBJECTS, content, detections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--objects", type=int, default=OBJECTS)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        path.write_text(json.dumps(content(options.images, options.objects)))
        annotations = CocoAnnotations.load(path)
    metric = CocoMetric(annotations, annotations.categories)
    for image_id, one in zip(annotations.image_ids.tolist(), detections(annotations)):
        metric.update([image_id], [one])
    expected = metric.compute()
    found = metric._gathered()
    data = evaluation_data(annotations, found, np.array(annotations.category_ids))
    print(f"{data.images} images, {options.objects} objects, {CATEGORIES} classes, {len(data.found_scores)} detections")
    start, processor = time.perf_counter(), time.process_time()
    matches = match_all(data)
    print(f"matching: {time.perf_counter() - start:.2f} s, of processor time {time.process_time() - processor:.2f} s")
    once = ap_metrics(average_precisions(matches, np.ones((1, data.images))))[0]
    np.testing.assert_allclose(once, [expected[name] for name in AP_METRICS], rtol=0, atol=1e-12)
    start, processor = time.perf_counter(), time.process_time()
    average_precisions(matches, resample_weights(data.images, options.samples, 0))
    print(
        f"{options.samples} resamples: {time.perf_counter() - start:.2f} s, of processor time "
        f"{time.process_time() - processor:.2f} s"
    )


if __name__ == "__main__":
    main()
