import json

import numpy as np
import pytest

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.errors import ArgumentError, UserError


@pytest.fixture
def load(tmp_path):
    def load(content, categories=None):
        path = tmp_path / "instances.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return CocoAnnotations.load(path, categories)

    return load


def objects_of(annotations, row):
    return slice(annotations.offsets[row], annotations.offsets[row + 1])


def test_annotations_are_sorted_by_image_and_labelled_by_ascending_category_id(content, load):
    loaded = load(content)
    assert len(loaded) == 3
    assert loaded.has_annotations
    assert loaded.image_ids.tolist() == [30, 10, 20]
    assert loaded.file_names.tolist() == ["c.png", "a.png", "b.png"]
    assert (loaded.category_ids, loaded.category_names) == ([2, 9], ["dog", "cat"])
    assert loaded.categories == [{"id": 2, "name": "dog"}, {"id": 9, "name": "cat"}]
    assert loaded.offsets.tolist() == [0, 2, 4, 5]
    assert loaded.labels.tolist() == [1, 2, 2, 1, 2]
    assert loaded.crowds.tolist() == [False, True, False, False, False]
    assert loaded.areas.tolist() == [310, 20, 40, 800, 20]
    assert loaded.image_rows.tolist() == [0, 0, 1, 1, 2]
    assert loaded.xywh[objects_of(loaded, 1)].tolist() == [[2, 4, 6, 8], [0, 0, 20, 40]]


def test_boxes_and_areas_are_exactly_those_of_the_file(content, load):
    content["annotations"][0].update(bbox=[0.1, 4.7, 1 / 3, 8], area=12.3456789)
    loaded = load(content)
    assert loaded.xywh.dtype == loaded.areas.dtype == np.float64
    assert loaded.xywh[2].tolist() == [0.1, 4.7, 1 / 3, 8]
    assert loaded.areas[2] == 12.3456789


def test_crowds_and_boxes_that_only_touch_the_image_are_not_usable(content, load):
    loaded = load(content)
    assert loaded.usable.tolist() == [True, False, True, True, False]
    assert loaded.images_with_objects().tolist() == [0, 1]
    assert loaded.portrait.tolist() == [False, True, False]


@pytest.mark.parametrize(("limit", "usable"), [(0.0, True), (0.9, True), (1.0, False), (2.0, False)])
@pytest.mark.parametrize("box", [[2, 4, 1, 8], [2, 4, 8, 1], [-3, 4, 4, 8]])
def test_objects_of_at_most_the_minimum_size_inside_the_image_are_not_usable(content, tmp_path, box, limit, usable):
    content["annotations"][0]["bbox"] = box
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    loaded = CocoAnnotations.load(path, min_box_size=limit)
    assert loaded.usable.tolist() == [True, False, usable, True, False]


def test_flat_boxes_as_in_coco_train2017_are_ignored_in_training_with_a_warning(content, load, caplog):
    content["annotations"][4]["bbox"] = [16.65, 38.33, 1.03, 0.0]
    loaded = load(content)
    assert loaded.usable.tolist() == [True, False, True, False, False]
    assert "instances.json: ignored in training: 2 boxes without area (annotation 4, annotation 5)" in caplog.text


def test_json_with_images_only_has_no_annotations(content, load):
    del content["annotations"]
    loaded = load(content)
    assert not loaded.has_annotations
    assert loaded.offsets.tolist() == [0, 0, 0, 0]
    assert len(loaded.images_with_objects()) == 0
    known = content.pop("categories")
    assert load(content, known).category_ids == [2, 9]


def test_known_categories_set_the_labels(content, load):
    known = [{"id": 1, "name": "ant"}, *content["categories"]]
    loaded = load(content, known)
    assert loaded.category_names == ["ant", "dog", "cat"]
    assert loaded.labels.tolist() == [2, 3, 3, 2, 3]


@pytest.mark.parametrize("known", [[{"id": 9, "name": "cat"}], [{"id": 9, "name": "cow"}, {"id": 2, "name": "dog"}]])
def test_categories_that_the_model_does_not_know_are_refused(content, load, known):
    with pytest.raises(UserError, match=r"instances\.json: 1 category that the model does not know .*'(dog|cat)'"):
        load(content, known)


def test_categories_that_no_annotation_has_may_be_unknown_to_the_model(content, load, caplog):
    known = content["categories"]
    content["categories"] = [{"id": 0, "name": "animals"}, *known]
    assert load(content, known).category_names == ["dog", "cat"]
    note = "ignored 1 category unknown to the model that no annotation has (category 0: 'animals')"
    assert note in caplog.text
    content["annotations"][0]["category_id"] = 0
    with pytest.raises(UserError, match=r"1 category that the model does not know .*category 0: 'animals'"):
        load(content, known)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": "a", "name": "cat"}], r"^categories\[0\]\.id='a': must be an integer"),
        ([{"id": 1}], r"^categories\[0\]=.*must be a mapping with id and name"),
        ([{"id": 1, "name": None}], r"^categories\[0\]\.name=None: must be a string"),
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "^categories: several have the same id"),
        ("cat", "^categories=cat: must be a list"),
    ],
)
def test_invalid_categories_of_a_caller_are_refused(content, load, categories, message):
    with pytest.raises(ArgumentError, match=message):
        load(content, categories)


def drop(*keys):
    def change(content):
        *path, last = keys
        for key in path:
            content = content[key]
        del content[last]

    return change


def put(value, *keys):
    def change(content):
        *path, last = keys
        for key in path:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("images"), "not a COCO annotation file (key 'images' is missing)"),
        (drop("categories"), "not a COCO annotation file (key 'categories' is missing)"),
        (put({}, "annotations"), "not a COCO annotation file ('annotations' is not a list of objects)"),
        (drop("images", 1, "width"), "1 image without width (image 10)"),
        (drop("annotations", 2, "bbox"), "1 annotation without bbox (annotation 3)"),
        (put(9, "categories", 1, "id"), "1 category listed twice (category 9)"),
        (put("x", "categories", 1, "id"), "1 category whose id is not an integer (categories[1]: 'x')"),
    ],
)
def test_invalid_json_is_refused_in_one_line_that_names_file_and_id(content, load, change, message):
    change(content)
    with pytest.raises(UserError) as error:
        load(content)
    assert "instances.json: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_faults_are_reported_together_with_their_counts_and_first_ids(content, load):
    for item in content["annotations"]:
        item["category_id"] = 77
    content["annotations"][0]["bbox"] = [0, 0, -1, 1]
    with pytest.raises(UserError) as error:
        load(content)
    first = "annotation 1: 77, annotation 2: 77, annotation 3: 77, ..."
    assert f"5 annotations of an unknown category ({first}); " in str(error.value)
    assert "1 annotation whose bbox has a negative width or height (annotation 1: [0, 0, -1, 1])" in str(error.value)
    assert str(error.value).endswith("; correct the file, or skip these with on_error=skip")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "not a COCO annotation file"), ("", "not valid JSON")]
)
def test_a_file_that_is_not_coco_json_is_refused_by_name(load, text, message):
    with pytest.raises(UserError, match=rf"instances\.json: {message}"):
        load(text)


def test_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        CocoAnnotations.load(tmp_path / "none.json")
