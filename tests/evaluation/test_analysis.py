"""The error analysis behind the report, on drawn detections with known faults."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.regression import spearman_corrcoef

from cpm_rcnn.evaluation import engines
from cpm_rcnn.evaluation.analysis.curves import MEAN
from cpm_rcnn.evaluation.analysis.image_costs import MISSED, ap_without_each, errors_per_image
from cpm_rcnn.evaluation.analysis.outcomes import KINDS, find_outcomes
from cpm_rcnn.evaluation.analysis.report import analyze
from cpm_rcnn.evaluation.analysis.score_ranking import rank_correlation, score_ranking
from cpm_rcnn.evaluation.analysis.split import EvaluatedSplit
from cpm_rcnn.evaluation.engines import METRIC_NAMES, EvaluationData, hotcoco_evaluator, precision_and_recall, summarize
from cpm_rcnn.evaluation.matching import match
from cpm_rcnn.evaluation.operating_points import points

IMAGES, CLASSES = 40, 3
OBJECTS = IMAGES * 6


def drawn(seed=0, noise=1.5, background=0.2, found=0.95):
    """A split whose objects stand on a grid of 3 x 2 places per image, and a good detector's detections."""
    rng = np.random.default_rng(seed)
    images = np.arange(OBJECTS) // 6 + 1
    places = np.stack([np.arange(OBJECTS) % 3, np.arange(OBJECTS) % 6 // 3], axis=1) * 100.0
    boxes = np.concatenate([places + rng.uniform(0, 40, (OBJECTS, 2)), rng.uniform(20, 55, (OBJECTS, 2))], axis=1)
    classes = rng.integers(1, CLASSES + 1, OBJECTS)
    chosen = (rng.uniform(size=OBJECTS) < found).nonzero()[0]
    empty = round(background * OBJECTS)
    far = np.concatenate([rng.uniform(0, 300, (empty, 1)), rng.uniform(300, 400, (empty, 1))], axis=1)
    false = np.concatenate([far, rng.uniform(10, 50, (empty, 2))], axis=1)
    data = EvaluationData(
        images=IMAGES,
        categories=CLASSES,
        object_images=images,
        object_categories=classes,
        object_boxes=boxes,
        object_areas=boxes[:, 2] * boxes[:, 3],
        object_crowds=np.zeros(OBJECTS, dtype=bool),
        found_images=np.concatenate([images[chosen], rng.integers(1, IMAGES + 1, empty)]),
        found_categories=np.concatenate([classes[chosen], rng.integers(1, CLASSES + 1, empty)]),
        found_boxes=np.concatenate([boxes[chosen] + rng.normal(0, noise, (len(chosen), 4)), false]),
        found_scores=np.concatenate([rng.uniform(0.6, 1, len(chosen)), rng.uniform(0, 0.5, empty)]),
    )
    return split_of(data)


def split_of(data, names=("cat", "dog", "owl"), details=None):
    ids = np.arange(data.images) * 2 + 5
    sizes = np.full((data.images, 2), (320, 400))
    file_names = np.array([f"{key}.jpg" for key in ids])
    return EvaluatedSplit(data, ids, file_names, sizes, [10 * (k + 1) for k in range(len(names))], list(names), details)


def report_of(split, precision=0.9):
    data = split.data
    groups, object_groups = (
        images * (data.categories + 1) + classes
        for images, classes in (
            (data.found_images, data.found_categories),
            (data.object_images, data.object_categories),
        )
    )
    outcomes = match(groups, data.found_boxes, data.found_scores, object_groups, data.object_boxes, data.object_crowds)
    classes = {}
    for k, name in enumerate(split.class_names, start=1):
        objects = int((~data.object_crowds & (data.object_categories == k)).sum())
        of_class = data.found_categories == k
        classes[name] = {"id": k, **points(data.found_scores[of_class], outcomes[of_class], objects, precision)}
    return analyze(split, {"iou": 0.5, "target_precision": precision, "classes": classes})


def with_data(split, **changes):
    return replace(split, data=replace(split.data, **changes))


def texts(report, section):
    return [each["text"] for each in report["findings"] if each["section"] == section]


def test_a_good_detector_has_no_warning():
    report = report_of(drawn())
    assert report["metrics"]["AP50"] > 0.9
    assert [each for each in report["findings"] if each["level"] == "warning"] == []
    assert report["labels"]["counts"]["other_class"] == report["labels"]["counts"]["duplicate"] == 0
    assert report["missing"] == {}


def test_a_planted_wrong_label_comes_first_in_the_labels():
    split = drawn()
    best = int(np.argmax(np.where(find_outcomes(split.data).kinds == 0, split.data.found_scores, 0)))
    row = int(find_outcomes(split.data).matched[best])
    classes = split.data.object_categories.copy()
    right = classes[row]
    classes[row] = right % CLASSES + 1
    report = report_of(with_data(split, object_categories=classes))

    first = report["labels"]["list"][0]
    assert report["labels"]["counts"]["other_class"] == 1
    assert first["kind"] == "other_class"
    assert first["image_id"] == split.image_ids[split.data.object_images[row] - 1]
    assert first["class"] == split.class_names[right - 1]
    assert first["annotated"] == split.class_names[classes[row] - 1]
    assert first["annotated_box"] == split.data.object_boxes[row].tolist()
    assert any("1 contradicted by a confident detection of another class" in text for text in texts(report, "labels"))


def test_a_planted_missing_annotation_and_a_planted_double_one_are_listed():
    split = drawn(background=0, found=1)
    data = split.data
    kept = np.arange(OBJECTS) != 7
    again = {"object_boxes": data.object_boxes[20:21] + 0.5}
    arrays = {name: getattr(data, name) for name in vars(data) if name.startswith("object_")}
    changed = {name: np.concatenate([value[kept], again.get(name, value[20:21])]) for name, value in arrays.items()}
    report = report_of(with_data(split, **changed))

    by_kind = {kind: [each for each in report["labels"]["list"] if each["kind"] == kind] for kind in KINDS_OF_LABELS}
    (missing,) = by_kind["not_annotated"]
    assert missing["image_id"] == split.image_ids[data.object_images[7] - 1]
    assert np.abs(np.array(missing["box"]) - data.object_boxes[7]).max() < 8
    assert missing["annotated"] is None
    (double,) = by_kind["duplicate"]
    assert sorted([double["box"], double["annotated_box"]]) == sorted(
        [data.object_boxes[20].tolist(), (data.object_boxes[20] + 0.5).tolist()]
    )
    assert "annotated twice" in double["text"]


KINDS_OF_LABELS = ("other_class", "not_annotated", "duplicate", "never_detected")


def test_an_annotation_that_nothing_reaches_is_listed_if_its_class_is_found_otherwise():
    split = drawn(background=0, found=1)
    kept = find_outcomes(split.data).matched != 11
    report = report_of(split.detections(kept))
    (entry,) = (each for each in report["labels"]["list"] if each["kind"] == "never_detected")
    assert entry["annotated_box"] == split.data.object_boxes[11].tolist()
    # A detector that finds nothing says nothing about labels.
    assert report_of(split.detections(np.zeros(len(kept), bool)))["labels"]["count"] == 0


def test_a_class_that_exists_twice_is_reported():
    split = drawn()
    rng = np.random.default_rng(1)
    data = split.data
    # Half of the annotations of class 1 are renamed to class 3, which has none of its own, and the detections too.
    objects, found = data.object_categories.copy(), data.found_categories.copy()
    objects[objects == 3], found[found == 3] = 2, 2
    objects[(objects == 1) & (rng.uniform(size=len(objects)) < 0.5)] = 3
    found[(found == 1) & (rng.uniform(size=len(found)) < 0.5)] = 3
    report = report_of(with_data(split, object_categories=objects, found_categories=found))

    (text,) = texts(report, "confusion")
    assert text.startswith("cat and owl are confused in both directions")
    assert "are they the same class?" in text
    assert report["findings"][0]["level"] == "warning"
    counts = np.array(report["confusion"]["counts"])
    assert min(counts[0, 2], counts[2, 0]) > 10
    assert counts[1, 0] == counts[0, 1] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((3, 0, 0, 0), "lie 3.0 px to the right of their"),
        ((0, -2, 0, 0), "lie 2.0 px above their"),
        ((0, 0, 4, 0), "lie 2.0 px to the right of and are 4.0 px wider than their"),
        ((1, 0, -2, 0), "are 2.0 px narrower than their"),
    ],
)
def test_a_systematic_offset_is_reported(change, words):
    split = drawn(noise=0)
    report = report_of(with_data(split, found_boxes=split.data.found_boxes + np.array(change, dtype=float)))
    (text,) = texts(report, "offsets")
    assert words in text
    together = report["offsets"]["classes"][0]
    left, top, right, bottom = change[0], change[1], change[0] + change[2], change[1] + change[3]
    assert together["pixels"] == pytest.approx([left, top, right, bottom])


def test_offsets_of_good_boxes_are_not_reported():
    assert texts(report_of(drawn()), "offsets") == []


def random_data(seed, crowds=0.0, images=25, objects=150, detections=400):
    """Boxes that overlap each other in all ways."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 120, (objects, 2)), rng.uniform(8, 60, (objects, 2))], axis=1)
    source = rng.integers(0, objects, detections)
    near = rng.uniform(size=detections) < 0.6
    others = np.concatenate([rng.uniform(0, 120, (detections, 2)), rng.uniform(8, 60, (detections, 2))], axis=1)
    found = np.where(near[:, None], boxes[source] + rng.normal(0, 4, (detections, 4)), others)
    found[:, 2:] = found[:, 2:].clip(min=1)
    object_images, object_classes = rng.integers(1, images + 1, objects), rng.integers(1, 4, objects)
    return EvaluationData(
        images=images,
        categories=3,
        object_images=object_images,
        object_categories=object_classes,
        object_boxes=boxes,
        object_areas=boxes[:, 2] * boxes[:, 3],
        object_crowds=rng.uniform(size=objects) < crowds,
        found_images=np.where(near, object_images[source], rng.integers(1, images + 1, detections)),
        found_categories=np.where(
            near & (rng.uniform(size=detections) < 0.8), object_classes[source], rng.integers(1, 4, detections)
        ),
        found_boxes=found,
        found_scores=rng.uniform(size=detections).astype(np.float32).astype(np.float64),
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_kinds_of_errors_are_those_of_tide(seed):
    data = random_data(seed)
    evaluator = hotcoco_evaluator(data)
    evaluator.evaluate()
    expected = evaluator.tide_errors(pos_thr=0.5, bg_thr=0.1)["counts"]
    counts = dict(zip(KINDS, np.bincount(find_outcomes(data).kinds, minlength=len(KINDS)).tolist()))
    names = {"classification": "Cls", "localization": "Loc", "both": "Both", "duplicate": "Dupe", "background": "Bkg"}
    assert {kind: counts[kind] for kind in names} == {kind: expected[key] for kind, key in names.items()}
    assert min(counts[kind] for kind in names) > 3
    statuses = evaluator.image_diagnostics(iou_thr=0.5)["dt_status"].values()
    assert counts["correct"] == sum(status == "tp" for status in statuses)


def test_ious_and_nearest_objects_are_those_of_a_loop():
    data = random_data(5, crowds=0.1, detections=120)
    outcomes = find_outcomes(data)

    def iou(a, b):
        sides = [max(0.0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
        overlap = sides[0] * sides[1]
        return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)

    reached = np.zeros(len(data.object_boxes))
    for row, box in enumerate(data.found_boxes):
        objects = (~data.object_crowds & (data.object_images == data.found_images[row])).nonzero()[0]
        values = [iou(box, data.object_boxes[each]) for each in objects]
        for each, value in zip(objects, values, strict=True):
            reached[each] = max(reached[each], value)
        same = [v for v, o in zip(values, objects) if data.object_categories[o] == data.found_categories[row]]
        assert outcomes.ious[row] == pytest.approx(max(same, default=0))
        assert outcomes.nearest_ious[row] == pytest.approx(max(values, default=0))
        if max(values, default=0) > 0:
            assert outcomes.nearest[row] == objects[int(np.argmax(values))]
        else:
            assert outcomes.nearest[row] == -1
    assert outcomes.reached == pytest.approx(reached)
    assert (outcomes.kinds == KINDS.index("ignored")).sum() > 0
    assert not outcomes.found[data.object_crowds].any()


def test_curves_at_a_threshold_count_the_detections_above_it():
    data = random_data(6, crowds=0.1)
    split = split_of(data)
    report = report_of(split)
    outcomes = find_outcomes(data)
    mean, *series = report["curves"]["series"]
    assert [mean["name"], *(each["name"] for each in series)] == [MEAN, *split.class_names]
    for k, of_class in enumerate(series, start=1):
        objects = ((data.object_categories == k) & ~data.object_crowds).sum()
        for t in (0, 25, 60, 90):
            above = (data.found_categories == k) & (data.found_scores >= report["curves"]["thresholds"][t])
            found = (above & (outcomes.kinds == 0)).sum()
            kept = found + (above & (outcomes.kinds > 0) & (outcomes.kinds != KINDS.index("ignored"))).sum()
            assert of_class["recall_at"][t] == pytest.approx(found / objects, abs=1e-4)
            assert of_class["precision_at"][t] == pytest.approx(found / kept, abs=1e-4)
            assert of_class["f1"][t] == pytest.approx(2 * found / (kept + objects), abs=1e-4)
    precision, recall = precision_and_recall(data)
    expected = dict(zip(METRIC_NAMES, summarize(precision, recall), strict=True))
    assert np.mean(mean["precision"]["0.50"]) == pytest.approx(expected["AP50"], abs=1e-4)
    assert np.mean(mean["precision"]["0.75"]) == pytest.approx(expected["AP75"], abs=1e-4)
    assert np.mean(mean["precision"]["0.50:0.95"]) == pytest.approx(expected["AP"], abs=1e-4)
    assert report["metrics"]["AP"] == expected["AP"]
    assert np.mean([each["AP"] for each in report["classes"]]) == pytest.approx(expected["AP"])
    assert [each["AP"] for each in report["sizes"]] == pytest.approx(
        [np.nan if expected[name] == -1 else expected[name] for name in ("APs", "APm", "APl")], nan_ok=True
    )


@pytest.mark.parametrize("ties", [False, True])
def test_the_rank_correlation_is_spearmans(ties):
    rng = np.random.default_rng(0)
    first = rng.uniform(size=200)
    second = first + rng.normal(0, 0.3, 200)
    if ties:
        first, second = first.round(1), second.round(1)
    expected = spearman_corrcoef(torch.from_numpy(first), torch.from_numpy(second))
    assert rank_correlation(first, second) == pytest.approx(float(expected), abs=1e-5)
    assert rank_correlation(first, first**3) == pytest.approx(1)
    assert rank_correlation(first, -first) == pytest.approx(-1)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5]])
def test_a_rank_correlation_without_ranks_is_undefined(values):
    assert math.isnan(rank_correlation(np.array(values), np.array(values)))


def test_scores_are_compared_after_each_step():
    split = drawn(noise=5)
    outcomes = find_outcomes(split.data)
    rng = np.random.default_rng(2)
    number = len(outcomes.ious)
    # Classification knows nothing of the IoU; ISM predicts it; RSM adds noise.
    class_scores, iou = rng.uniform(0.7, 1, number), outcomes.ious.clip(0.05, 1)
    probability = rng.uniform(0.5, 1, number)
    final = (class_scores * iou) ** 0.8 * probability**0.2
    details = np.stack([class_scores, iou, probability], axis=1)
    whole = replace(with_data(split, found_scores=final), details=details)
    found = score_ranking(whole, find_outcomes(whole.data))

    assert [each["name"] for each in found["stages"]] == ["classification", "ISM", "RSM"]
    first, ism, rsm = (each["rank_correlation"]["found"] for each in found["stages"])
    assert first < rsm < ism
    assert found["predicted_iou"]["rank_correlation"]["all"] > 0.99
    assert found["stages"][-1]["AP"] == report_of(whole)["metrics"]["AP"]
    assert found["stages"][1]["AP"] > found["stages"][0]["AP"]
    for stage in found["stages"]:
        assert sum(each["count"] for each in stage["bins"]) == number
        assert len(stage["points"]) > 100
    report = report_of(whole)
    assert sum(text.startswith(("ISM changes", "RSM changes")) for text in texts(report, "scores")) == 2

    # Heads without a part have fewer steps.
    for columns, names in (
        ((1, 2), ["classification"]),
        ((2,), ["classification", "ISM"]),
        ((1,), ["classification", "RSM"]),
    ):
        fewer = details.copy()
        fewer[:, columns] = np.nan
        short = score_ranking(replace(whole, details=fewer), outcomes)
        assert [each["name"] for each in short["stages"]] == names
        assert (short["predicted_iou"] is None) == (1 in columns)
    assert [each["name"] for each in score_ranking(split, outcomes)["stages"]] == ["score"]


def test_the_cost_of_an_image_is_the_ap_without_it_minus_the_ap():
    split = split_of(random_data(7))
    data = split.data
    costs = ap_without_each(split, np.array([3, 0, 9]))
    whole = summarize(*precision_and_recall(data))[0]
    for image, cost in zip((3, 0, 9), costs, strict=True):
        rest = {
            name: getattr(data, name)[getattr(data, f"{name.split('_')[0]}_images") != image + 1]
            for name in vars(data)
            if "_" in name
        }
        assert cost == pytest.approx(summarize(*precision_and_recall(replace(data, **rest)))[0] - whole, abs=1e-9)


def test_costly_images_have_their_errors():
    split = drawn()
    data = split.data
    # One image has all its detections at the wrong place.
    boxes = data.found_boxes.copy()
    boxes[data.found_images == 12] += 200
    report = report_of(with_data(split, found_boxes=boxes))
    first = report["images"]["list"][0]
    assert first["id"] == split.image_ids[11]
    assert first["cost"] > 0
    assert first["counts"][MISSED] == 6
    assert sum(item["kind"] == MISSED for item in first["items"]) == 6
    assert [each["cost"] for each in report["images"]["list"]] == sorted(
        (each["cost"] for each in report["images"]["list"]), reverse=True
    )
    assert (
        errors_per_image(split, find_outcomes(data)).sum()
        == (find_outcomes(data).kinds > 0).sum() + (~find_outcomes(data).found).sum()
    )


def test_an_unfinished_detector_and_an_empty_split_have_a_report():
    split = drawn()
    nothing = split.detections(np.zeros(len(split.data.found_scores), bool))
    report = report_of(nothing)
    assert report["metrics"]["AP"] == 0
    assert report["offsets"] is None
    assert texts(report, "classes") == ["Not a single object is detected: cat, dog, owl."]
    no_objects = {name: getattr(split.data, name)[:0] for name in vars(split.data) if name.startswith("object_")}
    empty = report_of(with_data(split, **no_objects))
    assert math.isnan(empty["metrics"]["AP"])
    assert texts(empty, "classes") == ["No object in the split: cat, dog, owl."]
    for each in (report, empty):
        json.dumps(each)


def test_without_hotcoco_its_sections_are_missing_with_a_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = report_of(drawn())
    assert report["confusion"] is report["errors"] is report["calibration"] is None
    assert set(report["missing"]) == {"confusion", "errors", "calibration"}
    assert "hotcoco is not installed" in report["missing"]["errors"]
    assert report["metrics"]["AP"] > 0


def test_where_hotcoco_would_never_return_its_sections_are_missing(monkeypatch):
    monkeypatch.setattr(engines._Threads, "lost", True)
    monkeypatch.setattr(engines, "hotcoco_evaluator", None)
    report = report_of(drawn())
    assert "fork" in report["missing"]["confusion"]
    assert report["metrics"]["AP"] > 0
