"""Operating points against a definition in plain Python, and their matching against pycocotools."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.evaluation import matching
from cpm_rcnn.evaluation.found import FoundDetections
from cpm_rcnn.evaluation.matching import FALSE_POSITIVE, IGNORED, TRUE_POSITIVE, match
from cpm_rcnn.evaluation.operating_points import operating_points, points

CATEGORIES = {"cat": 7, "dog": 3, "cow": 90}
IMAGES = [5, -2, 44, 2**40]


def random_case(seed, objects=8, detections=30, ties=False):
    """Objects, some of them crowds and some equal, and detections that are often near them."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image_id in IMAGES[: rng.integers(1, 5)]:
        boxes = []
        for _ in range(rng.integers(0, objects + 1)):
            repeated = boxes and rng.random() < 0.2
            box = list(boxes[-1][0]) if repeated else [*rng.integers(0, 100, 2), *rng.integers(10, 60, 2)]
            category = int(rng.choice(list(CATEGORIES.values())))
            boxes.append((box, category))
            item = {"image_id": image_id, "category_id": category, "bbox": [float(x) for x in box]}
            truth.append(item | {"area": float(box[2] * box[3]), "iscrowd": int(rng.random() < 0.25)})
        for _ in range(rng.integers(0, detections + 1)):
            box, category = [*rng.integers(0, 100, 2), 30, 30], int(rng.choice(list(CATEGORIES.values())))
            if boxes and rng.random() < 0.8:
                box, category = boxes[rng.integers(len(boxes))]
                box = [x + y * rng.choice([0, 0.2]) for x, y in zip(box, rng.normal(size=4) * box[2])]
            score = rng.choice([0.3, 0.6]) if ties else rng.random()
            bbox = [float(x) for x in (*box[:2], *(max(side, 1) for side in box[2:]))]
            found.append({"image_id": image_id, "category_id": category, "bbox": bbox, "score": float(score)})
    return truth, found


def write(path, truth):
    content = {
        "images": [{"id": i, "width": 200, "height": 200, "file_name": f"{i}.jpg"} for i in IMAGES],
        "categories": [{"id": i, "name": name} for name, i in CATEGORIES.items()],
        "annotations": [{"id": k, **item} for k, item in enumerate(truth, start=1)],
    }
    path.write_text(json.dumps(content))
    return path


def as_arrays(rows, image_ids):
    """Detections in COCO's results format as the arrays that are evaluated."""
    ids = (np.array([row[key] for row in rows], dtype=np.int64) for key in ("image_id", "category_id"))
    boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    return FoundDetections(
        np.unique(image_ids), *ids, boxes, np.array([row["score"] for row in rows], dtype=np.float64)
    )


def iou(box, item):
    """The IoU of a detection's box with an object."""
    (a, b, w, h), (x, y, u, v) = box, item["bbox"]
    width, height = min(a + w, x + u) - max(a, x), min(b + h, y + v) - max(b, y)
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (w * h if item["iscrowd"] else w * h + u * v - width * height)


def outcomes_one_by_one(truth, found):
    """The definition: what becomes of each detection."""
    taken, outcomes = set(), {}
    for row in sorted(range(len(found)), key=lambda row: -found[row]["score"]):
        mine = [
            (number, iou(found[row]["bbox"], item))
            for number, item in enumerate(truth)
            if item["image_id"] == found[row]["image_id"] and item["category_id"] == found[row]["category_id"]
        ]
        free = [(o, n) for n, o in mine if o >= 0.5 and not truth[n]["iscrowd"] and n not in taken]
        if free:
            taken.add(max(free)[1])
            outcomes[row] = TRUE_POSITIVE
        else:
            outcomes[row] = IGNORED if any(o >= 0.5 and truth[n]["iscrowd"] for n, o in mine) else FALSE_POSITIVE
    return [outcomes[row] for row in range(len(found))]


def points_one_by_one(scores, outcomes, objects, precision):
    """The definition: every score is tried as a threshold."""
    best, reached = None, None
    for threshold in sorted(set(scores), reverse=True):
        kept = [outcome for score, outcome in zip(scores, outcomes) if score >= threshold and outcome != IGNORED]
        hits = kept.count(TRUE_POSITIVE)
        if not kept or not objects:
            continue
        point = {"threshold": threshold, "precision": hits / len(kept), "recall": hits / objects}
        point["f1"] = 2 * hits / (len(kept) + objects)
        if hits and (best is None or point["f1"] > best["f1"]):
            best = point
        # A threshold at which only ignored detections are added is no point of its own.
        added = any(score == threshold and outcome != IGNORED for score, outcome in zip(scores, outcomes))
        if point["precision"] >= precision and added:
            reached = point
    return {"objects": objects, "best_f1": best, "precision": reached}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("precision", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_random_cases_have_the_points_of_the_definition(tmp_path, monkeypatch, ties, precision, chunk):
    monkeypatch.setattr(matching, "_CHUNK", chunk)
    reached = 0
    for seed in range(30):
        truth, found = random_case(seed, ties=ties)
        annotations = CocoAnnotations.load(write(tmp_path / "truth.json", truth))
        result = operating_points(annotations, as_arrays(found, IMAGES), CATEGORIES, precision)
        assert (result["iou"], result["target_precision"]) == (0.5, precision)
        assert list(result["classes"]) == list(CATEGORIES)
        outcomes = outcomes_one_by_one(truth, found)
        for name, category_id in CATEGORIES.items():
            mine = [row for row, one in enumerate(found) if one["category_id"] == category_id]
            count = sum(item["category_id"] == category_id and not item["iscrowd"] for item in truth)
            scores = [found[row]["score"] for row in mine]
            expected = points_one_by_one(scores, [outcomes[row] for row in mine], count, precision)
            assert result["classes"][name] == {"id": category_id, **expected}
            reached += expected["precision"] is not None
    assert reached > 3
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("ties", [False, True])
def test_detections_are_matched_as_in_pycocotools(tmp_path, ties):
    seen = set()
    for seed in range(40):
        truth, found = random_case(1000 + seed, objects=12, detections=60, ties=ties)
        if not found:
            continue
        path = write(tmp_path / "truth.json", truth)
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(path))
            detections = coco.loadRes(found)
            evaluator = COCOeval(coco, detections, "bbox")
            evaluator.params.maxDets = [1000]
            evaluator.params.iouThrs = np.array([0.5])
            evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluator.evaluate()
        expected = {}
        for one in filter(None, evaluator.evalImgs):
            for number, matched, ignored in zip(one["dtIds"], one["dtMatches"][0], one["dtIgnore"][0]):
                expected[number] = IGNORED if ignored else TRUE_POSITIVE if matched else FALSE_POSITIVE
        numbers = {pair: k for k, pair in enumerate(sorted({(d["image_id"], d["category_id"]) for d in truth + found}))}
        groups, object_groups = (
            np.array([numbers[item["image_id"], item["category_id"]] for item in items], dtype=np.int64)
            for items in (found, truth)
        )
        boxes, object_boxes = (
            np.array([item["bbox"] for item in items], dtype=np.float64).reshape(-1, 4) for items in (found, truth)
        )
        scores, crowds = np.array([item["score"] for item in found]), np.array([item["iscrowd"] for item in truth]) > 0
        outcomes = match(groups, boxes, scores, object_groups, object_boxes, crowds)
        # loadRes numbers the detections from 1.
        assert outcomes.tolist() == [expected[k] for k in range(1, len(found) + 1)]
        seen |= set(outcomes.tolist())
    assert seen == {TRUE_POSITIVE, FALSE_POSITIVE, IGNORED}


def test_images_and_classes_that_do_not_count_are_left_out(tmp_path):
    truth, found = random_case(4)
    annotations = CocoAnnotations.load(write(tmp_path / "truth.json", truth))
    some = [item["image_id"] for item in truth][:1]
    mine = [[row for row in rows if row["image_id"] in some and row["category_id"] == 3] for rows in (truth, found)]
    result = operating_points(annotations, as_arrays(mine[1], some), {"dog": 3}, 0.5)
    count = sum(not item["iscrowd"] for item in mine[0])
    outcomes = outcomes_one_by_one(*mine)
    assert count > 0
    expected = points_one_by_one([row["score"] for row in mine[1]], outcomes, count, 0.5)
    assert result["classes"] == {"dog": {"id": 3, **expected}}


def test_a_class_without_objects_or_without_hits_has_no_points():
    assert points(np.array([0.9]), np.array([FALSE_POSITIVE]), 0, 0.5) == {
        "objects": 0,
        "best_f1": None,
        "precision": None,
    }
    missed = points(np.array([0.9]), np.array([FALSE_POSITIVE]), 2, 0.5)
    assert missed == {"objects": 2, "best_f1": None, "precision": None}
    assert points(np.zeros(0), np.zeros(0), 2, 0.5) == missed


def test_without_a_wanted_precision_there_is_only_the_best_f1():
    result = points(np.array([0.9, 0.8]), np.array([TRUE_POSITIVE, FALSE_POSITIVE]), 1, None)
    assert result["best_f1"] == {"threshold": 0.9, "precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert result["precision"] is None


def test_the_lowest_threshold_of_a_precision_may_lie_below_one_that_misses_it():
    outcomes = np.array([FALSE_POSITIVE, TRUE_POSITIVE, TRUE_POSITIVE, FALSE_POSITIVE])
    result = points(np.array([0.9, 0.8, 0.7, 0.6]), outcomes, 3, 0.6)
    assert result["precision"]["threshold"] == 0.7
    assert result["precision"]["precision"] == pytest.approx(2 / 3)
