import copy
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from cpm_rcnn.data.samplers import Sample
from cpm_rcnn.data.annotations import CocoAnnotations, CocoDataset
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.transforms import EvalTransform
from cpm_rcnn.errors import UserError
from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS, INCLUSIVE

CONTENT = {
    "images": [
        {"id": 30, "file_name": "c.png", "height": 20, "width": 40},
        {"id": 10, "file_name": "a.png", "height": 40, "width": 20},
        {"id": 20, "file_name": "b.png", "height": 20, "width": 20},
    ],
    "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 10, "category_id": 9, "bbox": [2, 4, 6, 8], "area": 40, "iscrowd": 0},
        {"id": 2, "image_id": 30, "category_id": 2, "bbox": [-5, 10, 15.5, 20], "iscrowd": 0},
        {"id": 3, "image_id": 30, "category_id": 9, "bbox": [0, 0, 5, 5], "area": 20, "iscrowd": 1},
        {"id": 4, "image_id": 20, "category_id": 9, "bbox": [20, 0, 5, 5], "area": 20, "iscrowd": 0},
        {"id": 5, "image_id": 10, "category_id": 2, "bbox": [0, 0, 20, 40]},
    ],
}


@pytest.fixture
def content():
    return copy.deepcopy(CONTENT)


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
    assert loaded.xywh[objects_of(loaded, 1)].tolist() == [[2, 4, 6, 8], [0, 0, 20, 40]]
    assert loaded.xywh.dtype == np.float32


def test_crowds_and_boxes_on_the_edge_are_not_usable(content, load):
    loaded = load(content)
    assert loaded.usable.tolist() == [True, False, True, True, False]
    assert loaded.images_with_objects().tolist() == [0, 1]
    assert loaded.portrait.tolist() == [False, True, False]


def test_flat_boxes_as_in_coco_train2017_are_left_out_with_a_warning(content, load, caplog):
    content["annotations"][4]["bbox"] = [16.65, 38.33, 1.03, 0.0]
    loaded = load(content)
    assert loaded.usable.tolist() == [True, False, True, False, False]
    assert "instances.json: 2 boxes without area are left out of training (annotation 4, annotation 5)" in caplog.text


def test_json_of_images_alone_has_no_annotations(content, load):
    del content["annotations"]
    loaded = load(content)
    assert not loaded.has_annotations
    assert loaded.offsets.tolist() == [0, 0, 0, 0]
    assert len(loaded.images_with_objects()) == 0
    del content["categories"]
    assert load(content, CONTENT["categories"]).category_ids == [2, 9]


def test_known_categories_set_the_labels(content, load):
    known = [{"id": 1, "name": "ant"}, *CONTENT["categories"]]
    loaded = load(content, known)
    assert loaded.category_names == ["ant", "dog", "cat"]
    assert loaded.labels.tolist() == [2, 3, 3, 2, 3]


@pytest.mark.parametrize("known", [[{"id": 9, "name": "cat"}], [{"id": 9, "name": "cow"}, {"id": 2, "name": "dog"}]])
def test_other_categories_than_the_models_are_refused(content, load, known):
    with pytest.raises(UserError, match=r"instances\.json: 1 categories that the model does not know .*'(dog|cat)'"):
        load(content, known)


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
        (drop("images"), "not COCO json (key 'images' is missing)"),
        (drop("categories"), "not COCO json (key 'categories' is missing)"),
        (put({}, "annotations"), "not COCO json ('annotations' is not a list of objects)"),
        (drop("images", 1, "width"), "1 images without width (image 10)"),
        (drop("annotations", 2, "bbox"), "1 annotations without bbox (annotation 3)"),
        (put(9, "categories", 1, "id"), "1 categories listed twice (category 9)"),
        (put("x", "categories", 1, "id"), "1 categories whose id is not a whole number (categories[1]: 'x')"),
    ],
)
def test_faulty_json_is_refused_in_one_line_that_names_file_and_id(content, load, change, message):
    change(content)
    with pytest.raises(UserError) as error:
        load(content)
    assert "instances.json: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_faults_are_told_at_once_with_their_count_and_first_ids(content, load):
    for item in content["annotations"]:
        item["category_id"] = 77
    content["annotations"][0]["bbox"] = [0, 0, -1, 1]
    with pytest.raises(UserError) as error:
        load(content)
    first = "annotation 1: 77, annotation 2: 77, annotation 3: 77, ..."
    assert f"5 annotations of an unknown category ({first}); " in str(error.value)
    assert "1 annotations whose bbox has a negative width or height (annotation 1: [0, 0, -1, 1])" in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not json"), ("[]", "not COCO json"), ("", "not json")])
def test_what_is_not_coco_json_is_refused_by_name(load, text, message):
    with pytest.raises(UserError, match=rf"instances\.json: {message}"):
        load(text)


def test_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        CocoAnnotations.load(tmp_path / "none.json")


@pytest.fixture
def dataset(content, load, tmp_path):
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])

    def dataset(convention=CONTINUOUS):
        return CocoDataset(load(content), ImageSource(tmp_path), EvalTransform(40, 100), convention)

    return dataset


def test_sample_is_a_network_size_image_with_its_target(dataset):
    image, target = dataset()[Sample(0, 0)]
    assert image.shape == (3, 40, 80)
    assert image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[0, 20, 21, 40]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1]
    assert target["labels"].dtype == torch.int64
    assert target["image_id"] == 30
    assert type(target["image_id"]) is int
    assert target["original_size"] == (20, 40)


def test_image_without_usable_object_has_empty_targets(dataset):
    _, target = dataset()[Sample(2, 0)]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_inclusive_boxes_end_on_their_last_pixel(dataset):
    _, target = dataset(INCLUSIVE)[Sample(0, 0)]
    assert target["boxes"].tolist() == [[0, 20, 19, 38]]


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda convention: convention.name)
def test_every_target_has_an_area(content, dataset, convention):
    content["annotations"][1]["bbox"] = [3, 3, 0.2, 9]
    content["annotations"][2].update(bbox=[39.9, 3, 5, 9], iscrowd=0)
    _, target = dataset(convention)[Sample(0, 0)]
    assert (convention.area(target["boxes"]) > 0).all()
    assert len(target["boxes"]) == len(target["labels"]) == (2 if convention is CONTINUOUS else 1)


def test_image_of_another_size_than_the_json_says_is_refused(dataset, tmp_path):
    Image.new("RGB", (41, 20)).save(tmp_path / "c.png")
    with pytest.raises(
        UserError, match=r"c\.png is 41 x 20 pixels, but .* say 40 x 20 \(image 30 of .*instances\.json\)"
    ):
        dataset()[Sample(0, 0)]


def test_dataset_survives_pickling(dataset):
    there, back = dataset(), pickle.loads(pickle.dumps(dataset()))
    assert torch.equal(there[Sample(1, 0)][1]["boxes"], back[Sample(1, 0)][1]["boxes"])
