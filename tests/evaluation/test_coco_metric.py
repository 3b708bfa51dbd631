import contextlib
import io
import json
import math
import multiprocessing
import os
import random

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cpm_rcnn.boxes import INCLUSIVE
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.evaluation import engines
from cpm_rcnn.evaluation.coco_metric import METRIC_NAMES, CocoMetric

# Deliberately neither in ascending order nor 1..C.
IDS = [7, 3, 90]
NAMES = ["cat", "dog", "cow"]
CATEGORIES = [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]


def _not_installed(data):
    raise ImportError("hotcoco")


def _unexpected(data):
    raise AssertionError("pycocotools was used")


@pytest.fixture(params=["hotcoco", "pycocotools"])
def engine(request, monkeypatch):
    """Run the test with each engine."""
    if request.param == "hotcoco":
        pytest.importorskip("hotcoco")
        monkeypatch.setattr(engines, "by_pycocotools", _unexpected)
    else:
        monkeypatch.setattr(engines, "by_hotcoco", _not_installed)


def _write(path, annotations, image_ids=(1, 2, 3, 44)):
    content = {
        "images": [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in image_ids],
        "categories": CATEGORIES,
    }
    if annotations is not None:
        content["annotations"] = [{"id": k, "iscrowd": 0, **a} for k, a in enumerate(annotations, start=1)]
    path.write_text(json.dumps(content))
    return path


def _metric(path, categories=CATEGORIES, **options):
    return CocoMetric(CocoAnnotations.load(path), categories, **options)


def _object(image_id, category_id, bbox, **more):
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        **more,
    }


def _found(boxes=(), scores=(), labels=()):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def _random_case(seed, images=(1, 2, 3, 44), objects=6, detections=12, ties=False):
    """Random objects with crowds and with areas smaller than their boxes, and detections often near them."""
    rng = random.Random(seed)
    truth, found = [], {}
    for image_id in images:
        boxes = []
        for _ in range(rng.randint(0, objects)):
            size = rng.choice([8, 30, 60, 200])
            x, y = rng.randint(0, 400), rng.randint(0, 250)
            bbox = [x, y, size * rng.uniform(0.5, 1.5), size * rng.uniform(0.5, 1.5)]
            annotation = _object(image_id, rng.choice(IDS), bbox, iscrowd=int(rng.random() < 0.2))
            annotation["area"] *= rng.uniform(0.4, 1)
            boxes.append((bbox, annotation["category_id"]))
            truth.append(annotation)
        rows = []
        for _ in range(rng.randint(0, detections)):
            if boxes and rng.random() < 0.7:
                (x, y, w, h), category = rng.choice(boxes)
                label = IDS.index(category) + 1 if rng.random() < 0.8 else rng.randint(1, 3)
            else:
                x, y, w, h, label = rng.randint(0, 400), rng.randint(0, 300), 50, 40, rng.randint(1, 3)
            x, y = x + rng.gauss(0, w / 12), y + rng.gauss(0, h / 12)
            score = rng.choice([0.3, 0.6]) if ties else rng.random()
            rows.append(([x, y, x + w, y + h], score, label))
        found[image_id] = _found(*zip(*rows)) if rows else _found()
    return truth, found


def _pycocotools(path, found, image_ids=None):
    """The evaluator of a direct call of pycocotools, with detections written as a user would."""
    rows = [
        {"image_id": i, "category_id": IDS[label - 1], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for i, one in found.items()
        for (x1, y1, x2, y2), score, label in zip(
            one["boxes"].double().tolist(), one["scores"].tolist(), one["labels"].tolist()
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluator = COCOeval(truth, truth.loadRes(rows) if rows else COCO(), "bbox")
        if not rows:
            evaluator.cocoDt.dataset["annotations"] = []
        evaluator.params.imgIds = list(found) if image_ids is None else image_ids
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def _assert_as_pycocotools(path, found, together=1):
    """The metrics, which must be those of pycocotools to the last bit."""
    metric = _metric(path)
    order = list(found)
    for start in range(0, len(order), together):
        batch = order[start : start + together]
        metric.update(batch, [found[image_id] for image_id in batch])
    metrics = metric.compute()
    expected = _pycocotools(path, found)
    assert [metrics[name] for name in METRIC_NAMES] == expected.stats.tolist()
    precision = expected.eval["precision"][:, :, :, 0, -1]
    for name, category_id in zip(NAMES, IDS):
        of_class = precision[:, :, sorted(IDS).index(category_id)]
        of_class = of_class[of_class > -1]
        assert metrics["per_class"][name] == (of_class.mean() if of_class.size else -1)
    return metrics


def test_hotcoco_is_used_if_installed_and_pycocotools_otherwise(tmp_path, monkeypatch, caplog):
    pytest.importorskip("hotcoco")
    used = []
    monkeypatch.setattr(engines, "by_pycocotools", lambda data, by=engines.by_pycocotools: used.append(1) or by(data))
    path = _write(tmp_path / "truth.json", [_object(1, 7, [0, 0, 50, 50])])
    _assert_as_pycocotools(path, {1: _found([[0, 0, 50, 50]], [0.9], [1])})
    assert not used
    monkeypatch.setattr(engines, "by_hotcoco", _not_installed)
    engines._warn_without_hotcoco.cache_clear()
    for _ in range(2):
        _assert_as_pycocotools(path, {1: _found([[0, 0, 50, 50]], [0.9], [1])})
    assert used
    assert caplog.text.count("hotcoco is not installed") == 1


@pytest.mark.usefixtures("engine")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), ties=st.booleans())
def test_random_cases_have_exactly_the_metrics_of_pycocotools(tmp_path, seed, ties):
    truth, found = _random_case(seed, ties=ties)
    _assert_as_pycocotools(_write(tmp_path / "truth.json", truth), found)


@pytest.mark.usefixtures("engine")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.lists(st.integers(1, 2**40), min_size=1, max_size=8, unique=True),
    seed=st.integers(0, 2**32),
    ties=st.booleans(),
    together=st.integers(1, 4),
)
def test_sparse_ids_in_any_order_have_exactly_the_metrics_of_pycocotools(tmp_path, images, seed, ties, together):
    truth, found = _random_case(seed, images, objects=20, detections=60, ties=ties)
    random.Random(seed).shuffle(truth)
    not_evaluated = images[: len(images) // 3]
    found = {image_id: one for image_id, one in found.items() if image_id not in not_evaluated}
    _assert_as_pycocotools(_write(tmp_path / "truth.json", truth, images), found, together)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("ties", [False, True])
def test_exact_overlaps_have_exactly_the_metrics_of_pycocotools(tmp_path, ties):
    """Boxes on a grid of pixels: many IoUs are equal to each other and to thresholds."""
    rng = random.Random(4)
    truth, found = [], {}
    for image_id in (1, 2, 3, 44):
        sides = [[8 * rng.randint(0, 3), 8 * rng.randint(0, 3), rng.randint(8, 40), 20] for _ in range(120)]
        truth += [_object(image_id, rng.choice(IDS), box, iscrowd=int(k % 9 == 0)) for k, box in enumerate(sides[:20])]
        found[image_id] = _found(
            [[x, y, x + w, y + h] for x, y, w, h in sides],
            [rng.choice([0.2, 0.7]) if ties else rng.random() for _ in sides],
            [rng.randint(1, 3) for _ in sides],
        )
    _assert_as_pycocotools(_write(tmp_path / "truth.json", truth), found)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("truth", "found"),
    [
        pytest.param([_object(1, 7, [0, 0, 50, 50])], {1: _found(), 2: _found()}, id="no detections"),
        pytest.param([], {1: _found([[0, 0, 9, 9]], [0.5], [1])}, id="no objects"),
        pytest.param([], {1: _found()}, id="neither"),
        pytest.param(
            [_object(1, 7, [0, 0, 200, 200], iscrowd=1)],
            {1: _found([[0, 0, 50, 50], [20, 20, 90, 90]], [0.5, 0.4], [1, 1])},
            id="crowd only",
        ),
        pytest.param(
            [_object(1, 7, [0, 0, 20, 20]), _object(1, 7, [0, 0, 200, 200], iscrowd=1)],
            {1: _found([[0, 0, 20, 20], [20, 20, 90, 90]], [0.4, 0.5], [1, 1])},
            id="crowd matches what the object does not",
        ),
        pytest.param(
            [_object(1, 3, [0, 0, 40, 40])],
            {1: _found([[0, 0, 40, 40], [0, 0, 40, 40]], [0.9, 0.8], [1, 3])},
            id="only detections of absent categories",
        ),
        pytest.param(
            [_object(1, 7, [5, 5, 1, 1]), _object(1, 3, [0, 0, 640, 480]), _object(2, 3, [1, 1, 32, 32])],
            {
                1: _found([[5, 5, 6, 6], [0, 0, 640, 480]], [0.9, 0.8], [1, 2]),
                2: _found([[1, 1, 33, 33]], [0.1], [2]),
            },
            id="tiny and huge areas and one on the border between two ranges",
        ),
    ],
)
def test_degenerate_cases_have_exactly_the_metrics_of_pycocotools(tmp_path, truth, found):
    _assert_as_pycocotools(_write(tmp_path / "truth.json", truth), found)


@pytest.mark.usefixtures("engine")
def test_more_than_100_detections_per_image_are_limited_as_in_pycocotools(tmp_path):
    truth, found = _random_case(5, objects=10, detections=10)
    filler = _found([[500, 300, 510 + k % 7, 320] for k in range(300)], [0.5] * 300, [1 + k // 150 for k in range(300)])
    found[1] = {key: torch.cat([filler[key], found[1][key]]) for key in filler}
    _assert_as_pycocotools(_write(tmp_path / "truth.json", truth), found)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("ties", [False, True])
def test_hundreds_of_detections_around_the_objects_are_limited_as_in_pycocotools(tmp_path, ties):
    truth, found = _random_case(6, objects=30, detections=1000, ties=ties)
    assert max(one["labels"].bincount().max() for one in found.values()) > 100
    _assert_as_pycocotools(_write(tmp_path / "truth.json", truth), found)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, -0.5])
def test_scores_that_are_not_in_0_to_1_have_exactly_the_metrics_of_pycocotools(tmp_path, score):
    truth, found = _random_case(8, detections=40)
    for one in found.values():
        one["scores"][::5] = score
    metrics = _assert_as_pycocotools(_write(tmp_path / "truth.json", truth), found)
    assert 0 < metrics["AP"] < 1


@pytest.mark.usefixtures("engine")
def test_categories_that_the_file_does_not_list_have_no_metrics(tmp_path):
    path = _write(tmp_path / "truth.json", [_object(1, 7, [0, 0, 50, 50])])
    other = [{"id": 5, "name": "sheep"}, *CATEGORIES]
    metric = CocoMetric(CocoAnnotations.load(path, other), other)
    metric.update([1], [_found([[0, 0, 50, 50], [0, 0, 50, 50]], [0.9, 0.8], [1, 2])])
    metrics = metric.compute()
    assert list(metrics["per_class"]) == NAMES
    assert metrics["AP"] == pytest.approx(1)
    only_other = CocoMetric(CocoAnnotations.load(path, other), other[:1])
    only_other.update([1], [_found([[0, 0, 50, 50]], [0.9], [1])])
    metrics = only_other.compute()
    assert metrics == {**dict.fromkeys(METRIC_NAMES, -1), "per_class": {}}


def _in_fork(metric, answers):
    answers.put(metric.compute())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_process_forked_after_an_evaluation_can_evaluate(tmp_path):
    truth, found = _random_case(9)
    path = _write(tmp_path / "truth.json", truth)
    expected = _assert_as_pycocotools(path, found)
    metric = _metric(path)
    metric.update(list(found), list(found.values()))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_fork, args=(metric, answers))
    child.start()
    try:
        assert answers.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()


@pytest.mark.usefixtures("engine")
def test_per_class_ap_is_assigned_to_the_right_class(tmp_path):
    truth = [_object(1, 7, [0, 0, 50, 50]), _object(2, 3, [10, 10, 60, 60])]
    path = _write(tmp_path / "truth.json", truth)
    metric = _metric(path)
    metric.update([1, 2], [_found([[0, 0, 50, 50]], [0.9], [1]), _found()])
    metrics = metric.compute()
    assert metrics["AP"] == pytest.approx(0.5)
    assert metrics["per_class"] == pytest.approx({"cat": 1.0, "dog": 0.0, "cow": -1.0})


@pytest.mark.usefixtures("engine")
def test_only_images_passed_to_update_are_evaluated(tmp_path):
    truth = [_object(1, 7, [0, 0, 50, 50]), _object(2, 7, [10, 10, 60, 60])]
    metric = _metric(_write(tmp_path / "truth.json", truth))
    metric.update([1], [_found([[0, 0, 50, 50]], [0.9], [1])])
    assert metric.compute()["AP"] == pytest.approx(1.0)


@pytest.mark.usefixtures("engine")
def test_a_repeated_image_counts_once_even_if_the_first_time_had_no_detections(tmp_path):
    path = _write(tmp_path / "truth.json", [_object(1, 7, [0, 0, 50, 50]), _object(2, 7, [0, 0, 9, 9])])
    metric = _metric(path)
    metric.update([2, 1], [_found(), _found([[0, 0, 50, 50]], [0.9], [1])])
    metric.update([1, 2], [_found([[0, 0, 50, 50]], [0.9], [1]), _found([[0, 0, 9, 9]], [0.8], [1])])
    assert metric.compute()["AR100"] == pytest.approx(0.5)
    assert metric.results() == [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 50, 50], "score": pytest.approx(0.9)}]


def test_the_results_have_the_same_metrics_when_read_by_pycocotools(tmp_path):
    truth, found = _random_case(11)
    path = _write(tmp_path / "truth.json", truth)
    metric = _metric(path)
    metric.update(list(found), list(found.values()))
    metrics = metric.compute()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        evaluator = COCOeval(coco, coco.loadRes(json.loads(json.dumps(metric.results()))), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert [metrics[name] for name in METRIC_NAMES] == pytest.approx(evaluator.stats.tolist(), abs=1e-12)


def test_inclusive_boxes_are_one_pixel_wider_in_the_results(tmp_path):
    metric = _metric(_write(tmp_path / "truth.json", []), convention=INCLUSIVE)
    metric.update([1], [_found([[10, 20, 29, 59]], [0.5], [2])])
    metric.compute()
    assert metric.results() == [{"image_id": 1, "category_id": 3, "bbox": [10, 20, 20, 40], "score": 0.5}]


def test_a_file_without_annotations_has_results_but_no_metrics(tmp_path):
    metric = _metric(_write(tmp_path / "test-dev.json", None))
    metric.update([44], [_found([[0, 0, 9, 9]], [0.5], [3])])
    metrics = metric.compute()
    assert list(metrics) == [*METRIC_NAMES, "per_class"]
    assert all(math.isnan(metrics[name]) for name in METRIC_NAMES)
    assert all(math.isnan(value) for value in metrics["per_class"].values())
    assert metric.results() == [{"image_id": 44, "category_id": 90, "bbox": [0, 0, 9, 9], "score": 0.5}]


def test_reset_removes_the_images(tmp_path):
    metric = _metric(_write(tmp_path / "truth.json", [_object(1, 7, [0, 0, 50, 50])]))
    metric.update([1], [_found([[0, 0, 50, 50]], [0.9], [1])])
    metric.compute()
    metric.reset()
    metric.update([1], [_found()])
    assert metric.compute()["AP"] == 0
    assert metric.results() == []


@pytest.mark.usefixtures("engine")
def test_nothing_is_printed(tmp_path, capfd):
    metric = _metric(_write(tmp_path / "truth.json", [_object(1, 7, [0, 0, 50, 50])]))
    metric.update([1], [_found([[0, 0, 50, 50]], [0.9], [1])])
    metric.compute()
    assert capfd.readouterr() == ("", "")


def test_annotations_without_area_or_iscrowd_have_the_area_of_their_box(tmp_path):
    bare = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 100, 100]}
    path = _write(tmp_path / "truth.json", [bare])
    content = json.loads(path.read_text())
    del content["annotations"][0]["iscrowd"]
    path.write_text(json.dumps(content))
    metric = _metric(path)
    metric.update([1], [_found([[0, 0, 100, 100]], [0.9], [1])])
    metrics = metric.compute()
    assert metrics["APl"] == pytest.approx(1)
    assert metrics["APs"] == -1


@pytest.mark.usefixtures("engine")
def test_objects_that_training_ignores_and_exact_areas_count(tmp_path):
    # The first object has no area, the second only touches the image. In float32, the last one would be medium too.
    truth = [
        _object(1, 7, [10, 10, 0, 30]),
        _object(1, 7, [640, 10, 30, 30]),
        _object(2, 3, [0.1, 0.1, 100, 100], area=96.0**2 + 1e-9),
    ]
    path = _write(tmp_path / "truth.json", truth)
    assert CocoAnnotations.load(path).usable.tolist() == [False, False, True]
    found = {1: _found([[640, 10, 670, 40]], [0.8], [1]), 2: _found([[0.1, 0.1, 100.1, 100.1]], [0.5], [2])}
    metrics = _assert_as_pycocotools(path, found)
    assert 0.4 < metrics["APs"] < 0.6
    assert metrics["APm"] == -1
    assert metrics["APl"] == pytest.approx(1)


@pytest.mark.usefixtures("engine")
def test_skipped_entries_do_not_count(tmp_path):
    truth, found = _random_case(2, objects=8)
    path = _write(tmp_path / "truth.json", truth)
    clean = _metric(path)
    content = json.loads(path.read_text())
    content["images"].insert(1, {"id": 5, "width": 640, "height": 0, "file_name": "5.jpg"})
    content["annotations"].insert(2, {"id": 1000, **_object(5, 7, [0, 0, 50, 50])})
    content["annotations"].append({"id": 1001, **_object(1, 7, [0, 0, -1, 50])})
    path.write_text(json.dumps(content))
    skipping = CocoMetric(CocoAnnotations.load(path, on_error="skip"), CATEGORIES)
    for metric in (clean, skipping):
        metric.update(list(found), list(found.values()))
    assert skipping.compute() == clean.compute()
    with pytest.raises(UserError, match=r"truth\.json: has no image with id 5$"):
        skipping.update([5], [_found()])


def test_classes_with_the_same_name_are_distinguished_by_id(tmp_path):
    categories = [{"id": i, "name": name} for i, name in zip(IDS, ["sign", "sign", "cow"])]
    metric = _metric(_write(tmp_path / "truth.json", []), categories)
    metric.update([1], [_found()])
    assert list(metric.compute()["per_class"]) == ["sign (7)", "sign (3)", "cow"]


def test_an_unknown_image_is_named_with_its_file(tmp_path):
    path = _write(tmp_path / "truth.json", [])
    with pytest.raises(UserError, match=r"truth\.json: has no image with id 5$"):
        _metric(path).update([5], [_found()])


def test_results_before_compute_are_refused_with_advice(tmp_path):
    with pytest.raises(RuntimeError, match="compute"):
        _metric(_write(tmp_path / "truth.json", [])).results()


def _with_details(found, *names):
    """Detections with the details ``names``, which are functions of the scores."""
    factors = {"class_scores": 0.5, "predicted_iou": 0.25, "rsm_probability": 0.125}
    return {**found, **{name: found["scores"] * factors[name] for name in names}}


def test_details_are_kept_on_request_and_a_part_that_the_head_lacks_is_left_out(tmp_path):
    _, found = _random_case(3)
    metric, plain = (_metric(_write(tmp_path / "truth.json", []), details=details) for details in (True, False))
    for image_id, one in found.items():
        for each in (metric, plain):
            each.update([image_id], [_with_details(one, "class_scores", "rsm_probability")])
    assert metric.compute() == plain.compute()
    assert len(metric.results()) > 20
    assert metric.results() == plain.results() == plain.results(details=True)
    for row, short in zip(metric.results(details=True), plain.results(), strict=True):
        assert row == short | {"class_score": row["score"] * 0.5, "rsm_probability": row["score"] * 0.125}
    assert not hasattr(plain, "details")


def _join(rank, folder, processes):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)


def _one_rank(rank, folder, shares):
    _join(rank, folder, len(shares[0]))
    found = torch.load(folder / "found.pt")
    answers = []
    if rank != 0:
        # Only the first process may compute.
        engines.by_hotcoco = engines.by_pycocotools = _unexpected
    for share in shares:
        metric = _metric(folder / "truth.json", details=True)
        for image_id in share[rank]:
            metric.update([image_id], [found[image_id]])
        answers.append((metric.compute(), metric.results(details=True)))
    torch.distributed.destroy_process_group()
    (folder / f"rank{rank}.json").write_text(json.dumps(answers))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_have_the_metrics_of_one(tmp_path):
    truth, found = _random_case(3, images=(1, 2, 3))
    found[2] = _found()
    path = _write(tmp_path / "truth.json", truth)
    found = {image_id: _with_details(one, "predicted_iou") for image_id, one in found.items()}
    torch.save(found, tmp_path / "found.pt")
    # The sampler repeats image 1; one process has only an image without detections; one has no image.
    shares = [([1, 3], [2, 1]), ([1, 3], [2]), ([], [1, 2, 3])]

    mp.spawn(_one_rank, (tmp_path, shares), nprocs=2)

    metric = _metric(path, details=True)
    metric.update(list(found), list(found.values()))
    alone = metric.compute()

    expected = metric.results(details=True)

    def by_score(rows):
        return sorted(rows, key=lambda row: (row["image_id"], row["score"]))

    assert alone["AP"] > 0
    assert all(row["predicted_iou"] == row["score"] * 0.25 for row in expected)
    for rank in range(2):
        for metrics, results in json.loads((tmp_path / f"rank{rank}.json").read_text()):
            assert metrics == alone
            assert by_score(results) == by_score(expected)


def _rank_with_a_failing_engine(rank, folder):
    _join(rank, folder, 2)

    def fail(data):
        raise MemoryError("too many detections")

    engines.by_hotcoco = engines.by_pycocotools = fail
    metric = _metric(folder / "truth.json")
    metric.update([rank + 1], [_found()])
    try:
        metric.compute()
    except (MemoryError, RuntimeError) as error:
        (folder / f"rank{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_failed_evaluation_ends_all_processes(tmp_path):
    _write(tmp_path / "truth.json", [])
    mp.spawn(_rank_with_a_failing_engine, (tmp_path,), nprocs=2)
    said = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == "MemoryError: too many detections"
    assert said[1] == "RuntimeError: the evaluation failed in process 0: MemoryError: too many detections"


RENUMBERED = {
    "from 0": lambda number: number - 1,
    "negative": lambda number: -number,
    "negative and positive": lambda number: number - 5,
    "above 2**53": lambda number: 2**53 + number,
    "next to 2**63": lambda number: 2**63 - 1 - number,
    "next to -2**63": lambda number: number - 2**63,
}


@pytest.mark.parametrize("ids", RENUMBERED)
@pytest.mark.parametrize("key", ["annotations", "images", "categories"])
@pytest.mark.parametrize("seed", range(2))
def test_the_values_of_ids_do_not_change_the_metrics(tmp_path, engine, ids, key, seed):
    truth, found = _random_case(seed)
    expected = _assert_as_pycocotools(_write(tmp_path / "plain.json", truth), found)

    renumber = RENUMBERED[ids]
    content = json.loads((tmp_path / "plain.json").read_text())
    for item in content[key]:
        item["id"] = renumber(item["id"])
    for item in content["annotations"]:
        for name, of in (("image_id", "images"), ("category_id", "categories")):
            item[name] = renumber(item[name]) if key == of else item[name]
    (tmp_path / "other.json").write_text(json.dumps(content))
    metric = _metric(tmp_path / "other.json", content["categories"])
    for image_id, one in found.items():
        metric.update([renumber(image_id) if key == "images" else image_id], [one])
    metrics = metric.compute()
    # Scores differ here, so that the order of images and categories decides nothing.
    assert [metrics[name] for name in METRIC_NAMES] == pytest.approx([expected[name] for name in METRIC_NAMES])
    assert metrics["per_class"] == pytest.approx(expected["per_class"])
    own_ids = {item["id"] for item in content["images"]}
    assert {result["image_id"] for result in metric.results()} <= own_ids
    assert {result["category_id"] for result in metric.results()} <= {item["id"] for item in content["categories"]}


def test_categories_with_string_ids_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"^categories\[0\]\.id='7': must be an integer"):
        _metric(_write(tmp_path / "a.json", []), [{"id": "7", "name": "cat"}])
