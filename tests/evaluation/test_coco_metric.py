import contextlib
import io
import json
import math
import random

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cpm_rcnn.errors import UserError
from cpm_rcnn.evaluation import coco_metric
from cpm_rcnn.evaluation.coco_metric import METRIC_NAMES, CocoMetric
from cpm_rcnn.boxes import INCLUSIVE

# On purpose not in ascending order, nor 1..C.
IDS = [7, 3, 90]
NAMES = ["cat", "dog", "cow"]


@pytest.fixture(params=["fast", "reference"])
def engine(request, monkeypatch):
    """Run the test with either engine, whichever would be chosen."""
    monkeypatch.setattr(coco_metric, "_engine", getattr(coco_metric, f"_{request.param}_engine"))


def _write(path, annotations, image_ids=(1, 2, 3, 44)):
    content = {
        "images": [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in image_ids],
        "categories": [{"id": i, "name": name} for i, name in zip(IDS, NAMES)],
    }
    if annotations is not None:
        content["annotations"] = [{"id": k, "iscrowd": 0, **a} for k, a in enumerate(annotations, start=1)]
    path.write_text(json.dumps(content))
    return path


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
    """Random truth with crowds and areas smaller than boxes, and detections that often come near it."""
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
    """What a direct call of pycocotools says, with detections written as a user would."""
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


def _assert_as_pycocotools(path, found):
    metric = CocoMetric(path, IDS, NAMES)
    for image_id, one in found.items():
        metric.update([image_id], [one])
    figures = metric.compute()
    expected = _pycocotools(path, found)
    assert [figures[name] for name in METRIC_NAMES] == pytest.approx(expected.stats.tolist(), abs=1e-12)
    precision = expected.eval["precision"][:, :, :, 0, -1]
    for name, category_id in zip(NAMES, IDS):
        of_class = precision[:, :, sorted(IDS).index(category_id)]
        of_class = of_class[of_class > -1]
        assert figures["per_class"][name] == pytest.approx(of_class.mean() if of_class.size else -1)
    return figures


def test_the_fast_engine_is_chosen_where_installed_and_pycocotools_elsewhere(monkeypatch):
    pytest.importorskip("faster_coco_eval")
    assert coco_metric._engine() == coco_metric._fast_engine()

    def missing():
        raise ImportError

    monkeypatch.setattr(coco_metric, "_fast_engine", missing)
    assert coco_metric._engine() == (COCO, COCOeval)


@pytest.mark.usefixtures("engine")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), ties=st.booleans())
def test_random_cases_have_exactly_pycocotools_figures(tmp_path, seed, ties):
    truth, found = _random_case(seed, ties=ties)
    _assert_as_pycocotools(_write(tmp_path / "truth.json", truth), found)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("truth", "found"),
    [
        pytest.param([_object(1, 7, [0, 0, 50, 50])], {1: _found(), 2: _found()}, id="no detections"),
        pytest.param([], {1: _found([[0, 0, 9, 9]], [0.5], [1])}, id="no truth"),
        pytest.param([], {1: _found()}, id="neither"),
        pytest.param(
            [_object(1, 7, [0, 0, 200, 200], iscrowd=1)],
            {1: _found([[0, 0, 50, 50], [20, 20, 90, 90]], [0.5, 0.4], [1, 1])},
            id="crowd only",
        ),
        pytest.param(
            [_object(1, 7, [0, 0, 20, 20]), _object(1, 7, [0, 0, 200, 200], iscrowd=1)],
            {1: _found([[0, 0, 20, 20], [20, 20, 90, 90]], [0.4, 0.5], [1, 1])},
            id="crowd takes what the object does not",
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
            id="tiny and huge areas and one on the border",
        ),
    ],
)
def test_degenerate_cases_have_exactly_pycocotools_figures(tmp_path, truth, found):
    _assert_as_pycocotools(_write(tmp_path / "truth.json", truth), found)


@pytest.mark.usefixtures("engine")
def test_more_than_a_hundred_detections_of_an_image_are_cut_as_pycocotools_cuts_them(tmp_path):
    truth, found = _random_case(5, objects=10, detections=10)
    filler = _found([[500, 300, 510 + k % 7, 320] for k in range(300)], [0.5] * 300, [1 + k // 150 for k in range(300)])
    found[1] = {key: torch.cat([filler[key], found[1][key]]) for key in filler}
    _assert_as_pycocotools(_write(tmp_path / "truth.json", truth), found)


@pytest.mark.usefixtures("engine")
def test_a_perfect_detector_has_one_and_names_its_classes_right(tmp_path):
    truth = [_object(1, 7, [0, 0, 50, 50]), _object(2, 3, [10, 10, 60, 60])]
    path = _write(tmp_path / "truth.json", truth)
    metric = CocoMetric(path, IDS, NAMES)
    metric.update([1, 2], [_found([[0, 0, 50, 50]], [0.9], [1]), _found()])
    figures = metric.compute()
    assert figures["AP"] == pytest.approx(0.5)
    assert figures["per_class"] == pytest.approx({"cat": 1.0, "dog": 0.0, "cow": -1.0})


@pytest.mark.usefixtures("engine")
def test_only_the_images_seen_are_evaluated(tmp_path):
    truth = [_object(1, 7, [0, 0, 50, 50]), _object(2, 7, [10, 10, 60, 60])]
    metric = CocoMetric(_write(tmp_path / "truth.json", truth), IDS, NAMES)
    metric.update([1], [_found([[0, 0, 50, 50]], [0.9], [1])])
    assert metric.compute()["AP"] == pytest.approx(1.0)


@pytest.mark.usefixtures("engine")
def test_an_image_seen_twice_counts_once_also_when_the_first_time_found_nothing(tmp_path):
    path = _write(tmp_path / "truth.json", [_object(1, 7, [0, 0, 50, 50]), _object(2, 7, [0, 0, 9, 9])])
    metric = CocoMetric(path, IDS, NAMES)
    metric.update([2, 1], [_found(), _found([[0, 0, 50, 50]], [0.9], [1])])
    metric.update([1, 2], [_found([[0, 0, 50, 50]], [0.9], [1]), _found([[0, 0, 9, 9]], [0.8], [1])])
    assert metric.compute()["AR100"] == pytest.approx(0.5)
    assert metric.results() == [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 50, 50], "score": pytest.approx(0.9)}]


def test_the_results_give_the_same_figures_when_read_by_pycocotools(tmp_path):
    truth, found = _random_case(11)
    path = _write(tmp_path / "truth.json", truth)
    metric = CocoMetric(path, IDS, NAMES)
    metric.update(list(found), list(found.values()))
    figures = metric.compute()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        evaluator = COCOeval(coco, coco.loadRes(json.loads(json.dumps(metric.results()))), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert [figures[name] for name in METRIC_NAMES] == pytest.approx(evaluator.stats.tolist(), abs=1e-12)


def test_inclusive_boxes_are_one_pixel_wider_in_the_results(tmp_path):
    metric = CocoMetric(_write(tmp_path / "truth.json", []), IDS, NAMES, convention=INCLUSIVE)
    metric.update([1], [_found([[10, 20, 29, 59]], [0.5], [2])])
    metric.compute()
    assert metric.results() == [{"image_id": 1, "category_id": 3, "bbox": [10, 20, 20, 40], "score": 0.5}]


def test_a_file_without_annotations_gives_results_but_no_figures(tmp_path):
    metric = CocoMetric(_write(tmp_path / "test-dev.json", None), IDS, NAMES)
    metric.update([44], [_found([[0, 0, 9, 9]], [0.5], [3])])
    figures = metric.compute()
    assert list(figures) == [*METRIC_NAMES, "per_class"]
    assert all(math.isnan(figures[name]) for name in METRIC_NAMES)
    assert all(math.isnan(value) for value in figures["per_class"].values())
    assert metric.results() == [{"image_id": 44, "category_id": 90, "bbox": [0, 0, 9, 9], "score": 0.5}]


def test_reset_forgets_the_images(tmp_path):
    metric = CocoMetric(_write(tmp_path / "truth.json", [_object(1, 7, [0, 0, 50, 50])]), IDS, NAMES)
    metric.update([1], [_found([[0, 0, 50, 50]], [0.9], [1])])
    metric.compute()
    metric.reset()
    metric.update([1], [_found()])
    assert metric.compute()["AP"] == 0
    assert metric.results() == []


@pytest.mark.usefixtures("engine")
def test_nothing_is_printed(tmp_path, capfd):
    metric = CocoMetric(_write(tmp_path / "truth.json", [_object(1, 7, [0, 0, 50, 50])]), IDS, NAMES)
    metric.update([1], [_found([[0, 0, 50, 50]], [0.9], [1])])
    metric.compute()
    assert capfd.readouterr().out == ""


def test_annotations_without_area_or_iscrowd_take_the_area_of_their_box(tmp_path):
    bare = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 100, 100]}
    path = _write(tmp_path / "truth.json", [bare])
    content = json.loads(path.read_text())
    del content["annotations"][0]["iscrowd"]
    path.write_text(json.dumps(content))
    metric = CocoMetric(path, IDS, NAMES)
    metric.update([1], [_found([[0, 0, 100, 100]], [0.9], [1])])
    figures = metric.compute()
    assert figures["APl"] == pytest.approx(1)
    assert figures["APs"] == -1


def test_classes_of_one_name_are_told_apart(tmp_path):
    metric = CocoMetric(_write(tmp_path / "truth.json", []), IDS, ["sign", "sign", "cow"])
    metric.update([1], [_found()])
    assert list(metric.compute()["per_class"]) == ["sign (7)", "sign (3)", "cow"]


def test_an_unknown_image_is_named_with_its_file(tmp_path):
    path = _write(tmp_path / "truth.json", [])
    with pytest.raises(UserError, match=r"truth\.json: has no image with id 5$"):
        CocoMetric(path, IDS, NAMES).update([5], [_found()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[1]", "is not a COCO annotation file"),
        ('{"annotations": []}', "lacks 'images'"),
        ('{"images": [], "annotations": [{"id": 1}]}', "lacks 'image_id'"),
    ],
)
def test_a_bad_annotation_file_is_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        CocoMetric(path, IDS, NAMES)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_results_before_compute_say_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match="compute"):
        CocoMetric(_write(tmp_path / "truth.json", []), IDS, NAMES).results()


def _one_rank(rank, folder, shares):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(shares[0])
    )
    found = torch.load(folder / "found.pt")
    answers = []
    for share in shares:
        metric = CocoMetric(folder / "truth.json", IDS, NAMES)
        for image_id in share[rank]:
            metric.update([image_id], [found[image_id]])
        answers.append((metric.compute(), metric.results()))
    torch.distributed.destroy_process_group()
    (folder / f"rank{rank}.json").write_text(json.dumps(answers))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_have_the_figures_of_one(tmp_path):
    truth, found = _random_case(3, images=(1, 2, 3))
    found[2] = _found()
    path = _write(tmp_path / "truth.json", truth)
    torch.save(found, tmp_path / "found.pt")
    # The sampler's padding repeats image 1; a process that finds nothing; one that has no image at all.
    shares = [([1, 3], [2, 1]), ([1, 3], [2]), ([], [1, 2, 3])]

    mp.spawn(_one_rank, (tmp_path, shares), nprocs=2)

    metric = CocoMetric(path, IDS, NAMES)
    metric.update(list(found), list(found.values()))
    alone = metric.compute()

    def by_score(rows):
        return sorted(rows, key=lambda row: (row["image_id"], row["score"]))

    assert alone["AP"] > 0
    for rank in range(2):
        for figures, results in json.loads((tmp_path / f"rank{rank}.json").read_text()):
            assert figures == alone
            assert by_score(results) == by_score(metric.results())
