"""The bootstrap against pycocotools on data sets in which images are really repeated."""

import numpy as np
import pytest

from cpm_rcnn.evaluation.bootstrap import (
    AP_METRICS,
    ap_metrics,
    average_precisions,
    class_metrics,
    compare_matches,
    match_all,
    resample_weights,
)
from cpm_rcnn.evaluation.engines import EvaluationData, by_pycocotools, summarize


def random_case(seed, images=6, categories=3, per_image=25, ties=True):
    """Objects of all sizes with crowds, and detections near them.

    With ``ties``, scores are equal in different images, but not within an image, and boxes lie on a grid, so that
    IoUs are equal.
    """
    rng = np.random.default_rng(seed)
    objects, found = int(rng.integers(1, 6 * images)), per_image * images
    boxes = np.c_[rng.integers(0, 300, (objects, 2)), rng.choice([12, 28, 64, 92, 120, 200], (objects, 2))].astype(
        float
    )
    repeated = rng.random(objects) < 0.15
    boxes[repeated] = boxes[rng.integers(0, objects, repeated.sum())]
    in_images, of_class = rng.integers(1, images + 1, objects), rng.integers(1, categories + 1, objects)
    near = rng.integers(0, objects, found)
    moved = boxes[near]
    moved += rng.choice([-8, -4, 0, 0, 4, 8], (found, 4))
    moved[:, 2:] = moved[:, 2:].clip(4)
    is_near = rng.random(found) < 0.85
    found_images = np.where(is_near, in_images[near], rng.integers(1, images + 1, found))
    scores = rng.random(found)
    if ties:
        order = np.argsort(rng.random(found))
        of_image = np.empty(found)
        for image in range(1, images + 1):
            mine = order[found_images[order] == image]
            of_image[mine] = np.arange(len(mine))
        scores = 1 / (2 + of_image)
    return EvaluationData(
        images=images,
        categories=categories,
        object_images=in_images,
        object_categories=of_class,
        object_boxes=boxes,
        object_areas=boxes[:, 2] * boxes[:, 3] * np.where(rng.random(objects) < 0.5, 1, rng.uniform(0.4, 1, objects)),
        object_crowds=rng.random(objects) < 0.2,
        found_images=found_images,
        found_categories=np.where(rng.random(found) < 0.9, of_class[near], rng.integers(1, categories + 1, found)),
        found_boxes=moved,
        found_scores=scores,
    )


def repeated(data, weights):
    """The data set with each image repeated as often as its weight says, with new numbers."""
    drawn = np.repeat(np.arange(1, data.images + 1), weights)

    def rows(images):
        pairs = [(row, new) for new, old in enumerate(drawn, start=1) for row in (images == old).nonzero()[0]]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2).T

    objects, object_images = rows(data.object_images)
    found, found_images = rows(data.found_images)
    return EvaluationData(
        len(drawn),
        data.categories,
        object_images,
        data.object_categories[objects],
        data.object_boxes[objects],
        data.object_areas[objects],
        data.object_crowds[objects],
        found_images,
        data.found_categories[found],
        data.found_boxes[found],
        data.found_scores[found],
    )


def by_definition(data):
    """The six metrics and the APs of the classes, by pycocotools; NaN for undefined ones."""
    precision, recall = by_pycocotools(data)
    values = np.array(summarize(precision, recall)[: len(AP_METRICS)])
    per_class = precision[:, :, :, 0, 2].mean(axis=(0, 1))
    return tuple(np.where(part == -1, np.nan, part) for part in (values, per_class))


def metrics_of(data, weights):
    values = average_precisions(match_all(data), weights)
    return ap_metrics(values), class_metrics(values)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ties", [False, True])
def test_without_resampling_the_metrics_are_those_of_pycocotools(seed, ties):
    data = random_case(seed, ties=ties)
    found = metrics_of(data, np.ones((1, data.images)))
    for one, expected in zip(found, by_definition(data)):
        np.testing.assert_allclose(one[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_a_resample_has_the_metrics_of_pycocotools_on_repeated_images(seed):
    data = random_case(seed, ties=seed % 2 == 1)
    weights = resample_weights(data.images, 4, seed)
    for row, metrics, per_class in zip(weights, *metrics_of(data, weights)):
        expected = by_definition(repeated(data, row))
        np.testing.assert_allclose(metrics, expected[0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(per_class, expected[1], rtol=0, atol=1e-9)


def test_more_than_100_detections_of_an_image_and_class_do_not_count():
    data = random_case(3, images=2, categories=1, per_image=250, ties=False)
    weights = np.array([[1, 1], [3, 1], [0, 2]])
    for row, metrics in zip(weights, metrics_of(data, weights)[0]):
        np.testing.assert_allclose(metrics, by_definition(repeated(data, row))[0], rtol=0, atol=1e-9)


def test_blocks_of_resamples_do_not_change_the_metrics(monkeypatch):
    data = random_case(1)
    weights = resample_weights(data.images, 9, 0)
    whole = metrics_of(data, weights)[0]
    monkeypatch.setattr("cpm_rcnn.evaluation.bootstrap._BLOCK", 1)
    np.testing.assert_array_equal(metrics_of(data, weights)[0], whole)


@pytest.mark.parametrize("missing", ["object", "found"])
def test_no_objects_is_undefined_and_no_detections_is_zero(missing):
    data = random_case(0)
    emptied = {
        name: value[:0] for name, value in vars(data).items() if isinstance(value, np.ndarray) and missing in name
    }
    data = EvaluationData(**(vars(data) | emptied))
    metrics, per_class = metrics_of(data, np.ones((1, data.images)))
    if missing == "object":
        assert np.isnan(metrics).all()
        assert np.isnan(per_class).all()
    else:
        assert metrics[0, 0] == 0
        assert np.nanmax(per_class) == 0


def test_weights_draw_as_many_images_as_there_are_and_depend_on_the_seed_only():
    weights = resample_weights(50, 20, 7)
    assert weights.shape == (20, 50)
    assert (weights.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(weights, resample_weights(50, 20, 7))
    assert (weights != resample_weights(50, 20, 8)).any()
    assert len(np.unique(weights, axis=0)) == 20


def test_intervals_are_shifted_percentiles_of_the_same_resamples_for_all_runs():
    data, other = random_case(4, images=12), random_case(4, images=12)
    other.found_boxes[::3] += 20
    runs = [match_all(data), match_all(other), match_all(data)]
    first, second, same = compare_matches(runs, ["a", "b", "c"], samples=50, seed=3)
    weights = resample_weights(12, 50, 3)
    one, two = (ap_metrics(average_precisions(each, weights)) for each in runs[:2])
    for k, name in enumerate(AP_METRICS):
        for result, column in (
            (first["metrics"][name], one[:, k]),
            (second["metrics"][name], two[:, k]),
            (second["metrics"][name]["difference"], two[:, k] - one[:, k]),
        ):
            low, median, high = np.nanpercentile(column, [2.5, 50, 97.5])
            expected = [result["value"] + low - median, result["value"] + high - median]
            assert [result["low"], result["high"]] == pytest.approx(expected, abs=1e-12)
        assert same["metrics"][name]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert "difference" not in first["metrics"]["AP"]
    assert second["metrics"]["AP"]["value"] == pytest.approx(by_definition(other)[0][0], abs=1e-12)
    value = by_definition(other)[0][0] - by_definition(data)[0][0]
    assert second["metrics"]["AP"]["difference"]["value"] == pytest.approx(value, abs=1e-12)
    assert value < 0
    assert list(second["per_class"]) == ["a", "b", "c"]


def test_a_class_that_some_resamples_lack_has_an_interval_of_the_others():
    data = random_case(2, images=4, categories=1)
    # One image has all objects of the class, so that a third of the resamples have none.
    only = data.object_images == data.object_images[0]
    names = ("object_images", "object_categories", "object_boxes", "object_areas", "object_crowds")
    data = EvaluationData(**(vars(data) | {name: getattr(data, name)[only] for name in names}))
    data.object_crowds[0] = False
    (result,) = compare_matches([match_all(data)], ["a"], samples=40)
    weights = resample_weights(4, 40, 0)[:, data.object_images[0] - 1]
    assert (weights == 0).any()
    values = class_metrics(average_precisions(match_all(data), resample_weights(4, 40, 0)))[:, 0]
    np.testing.assert_array_equal(np.isnan(values), weights == 0)
    low, median = np.nanpercentile(values, [2.5, 50])
    assert result["per_class"]["a"]["low"] == pytest.approx(result["per_class"]["a"]["value"] + low - median)
