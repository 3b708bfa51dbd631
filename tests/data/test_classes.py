"""The classes to detect: which are kept, in which order, and how those of different files are matched."""

import copy
import json

import numpy as np
import pytest

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.classes import ClassSelection, check_classes
from cpm_rcnn.data.settings import DataSettings
from cpm_rcnn.data.splits import DataSplits
from cpm_rcnn.errors import ArgumentError, UserError

CATEGORIES = [{"id": 3, "name": "car"}, {"id": 5, "name": "truck"}, {"id": 8, "name": "person"}]
CONTENT = {
    "images": [{"id": n, "file_name": f"{n}.png", "height": 80, "width": 100} for n in (1, 2)],
    "categories": CATEGORIES,
    "annotations": [
        {"id": n, "image_id": 1 + (n > 3), "category_id": key, "bbox": [n, n, 10, 10]}
        for n, key in enumerate([3, 5, 8, 8, 3, 8], start=1)
    ],
}


@pytest.fixture
def splits(tmp_path):
    def splits(categories=None, val=CONTENT, **settings):
        for split, content in (("train", CONTENT), ("val", val)):
            (tmp_path / f"{split}.json").write_text(json.dumps(content))
        files = {f"{split}_json": f"{split}.json" for split in ("train", "val")}
        files |= {f"{split}_images": "images" for split in ("train", "val")}
        return DataSplits(DataSettings(root=str(tmp_path), **files, **settings), categories)

    return splits


def renamed(*categories):
    """The content with other categories, in which objects keep the names of their classes where they exist."""
    names = {category["id"]: category["name"] for category in CATEGORIES}
    keys = {name: key for key, name in categories}
    objects = [entry | {"category_id": keys.get(names[entry["category_id"]], 0)} for entry in CONTENT["annotations"]]
    return CONTENT | {
        "categories": [{"id": key, "name": name} for key, name in categories],
        "annotations": [entry for entry in objects if entry["category_id"]],
    }


@pytest.mark.parametrize(
    ("classes", "names", "numbers", "labels"),
    [
        (["car", "truck", "person"], ["car", "truck", "person"], [1, 2, 3, 4, 5, 6], [1, 2, 3, 3, 1, 3]),
        (["person", "car"], ["person", "car"], [1, 3, 4, 5, 6], [2, 1, 1, 2, 1]),
        ([{"vehicle": ["car", "truck"]}], ["vehicle"], [1, 2, 5], [1, 1, 1]),
        (["person", {"auto": "car"}], ["person", "auto"], [1, 3, 4, 5, 6], [2, 1, 1, 2, 1]),
        ([{"car": ["truck"]}], ["car"], [1, 2, 5], [1, 1, 1]),
        ([{"car": "truck"}, {"truck": "car"}], ["car", "truck"], [1, 2, 5], [2, 1, 2]),
    ],
    ids=["all", "order and subset", "merged", "renamed", "into another", "exchanged"],
)
def test_classes_are_kept_ordered_renamed_and_merged(splits, classes, names, numbers, labels):
    data = splits(classes=classes)
    assert [category["name"] for category in data.categories] == names
    for split in ("train", "val"):
        found = data.annotations(split)
        assert found.category_names == names
        assert found.xywh[:, 0].tolist() == numbers
        assert found.labels.tolist() == labels
        assert found.listed.all()
        assert not found.is_json
    # A checkpoint's classes are matched the same way.
    again = splits(data.categories, classes=classes).annotations("val")
    assert again.labels.tolist() == labels


def test_an_image_whose_objects_were_left_out_has_no_objects(splits):
    found = splits(classes=["truck"]).annotations("train")
    assert found.images_with_objects().tolist() == [0]
    assert found.images_without_objects().tolist() == [1]


def test_a_class_that_the_training_annotations_lack_is_refused_but_validation_may_have_a_subset(splits):
    with pytest.raises(ArgumentError, match=r"^classes: .*train\.json has no class trcuk \(did you mean truck\?\); it"):
        splits(classes=["car", {"lorry": "trcuk"}]).annotations("train")
    data = splits(classes=["car", "person"], val=renamed((1, "person")))
    found = data.annotations("val")
    assert found.labels.tolist() == [2, 2, 2]
    assert found.listed.tolist() == [False, True]


def test_classes_that_a_model_does_not_have_are_refused(splits):
    with pytest.raises(ArgumentError, match=r"^classes: bus is not a class of the model; it has car, truck, person"):
        splits(CATEGORIES, classes=["car", {"bus": "truck"}])
    found = splits(CATEGORIES, classes=[{"truck": "car"}]).annotations("val")
    assert found.category_names == ["car", "truck", "person"]
    assert found.labels.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("car", "classes=car: must be a list, for example [car]"),
        ([], "classes=[]: must not be empty"),
        ([3], "classes[0]=3: must be a name, or {new: old} or {new: [old, ...]} to rename and merge; write numbers in"),
        ([None], "classes[0]=null: must be a name"),
        ([""], "classes[0]=: must be a name"),
        (["a", {"b": "c", "d": "e"}], "classes[1]={b: c, d: e}: must be a name"),
        ([{"b": []}], "classes[0]={b: []}: must be a name"),
        ([{"b": [3]}], "classes[0]={b: [3]}: must be a name"),
        ([{3: "b"}], "classes[0]={3: b}: must be a name"),
        (["a", "a"], "classes[1]=a: a belongs to a already"),
        (["a", {"b": ["c", "a"]}], "classes[1]={b: [c, a]}: a belongs to a already"),
        ([{"b": "c"}, {"b": "d"}], "classes=[{b: c}, {b: d}]: b occurs twice"),
    ],
)
def test_an_invalid_selection_is_refused(value, message):
    with pytest.raises(ArgumentError) as error:
        check_classes("classes", value)
    assert str(error.value).startswith(message)
    with pytest.raises(ArgumentError):
        DataSettings(classes=value)


def test_validation_categories_in_another_order_or_a_subset_are_matched_by_name(splits, caplog):
    found = splits(val=renamed((1, "person"), (2, "car"), (9, "truck"))).annotations("val")
    assert found.category_ids == [3, 5, 8]
    assert found.labels.tolist() == [1, 2, 3, 3, 1, 3]
    note = "matched 3 categories with another id by name (category 1: 'person', category 2: 'car', category 9: 'truck')"
    assert f"{note}; detections have the model's ids, 8, 3, 5" in caplog.text
    subset = splits(val=renamed((3, "person"), (5, "truck"))).annotations("val")
    assert subset.labels.tolist() == [2, 3, 3, 3]
    assert subset.listed.tolist() == [False, True, True]


def test_a_category_of_an_unknown_name_is_refused_if_annotations_have_it(splits, caplog):
    other = renamed((3, "car"), (8, "person"))
    other["categories"].append({"id": 5, "name": "bus"})
    assert splits(val=other).annotations("val").labels.tolist() == [1, 3, 3, 1, 3]
    assert "ignored 1 category unknown to the model that no annotation has (category 5: 'bus')" in caplog.text
    other["annotations"][0]["category_id"] = 5
    with pytest.raises(UserError, match=r"1 category that the model does not know by its name \(category 5: 'bus'\)"):
        splits(val=other).annotations("val")


def test_ids_that_a_file_does_not_list_are_accepted_unless_its_numbers_differ(tmp_path):
    path = tmp_path / "a.json"
    listed = CONTENT | {"categories": CATEGORIES[:1]}
    path.write_text(json.dumps(listed))
    assert CocoAnnotations.load(path, CATEGORIES).labels.tolist() == [1, 2, 3, 3, 1, 3]
    path.write_text(json.dumps(listed | {"categories": [{"id": 3, "name": "person"}]}))
    with pytest.raises(UserError, match=r"4 annotations of an unknown category \(annotation 2: 5, "):
        CocoAnnotations.load(path, CATEGORIES)


def test_models_with_several_classes_of_one_name_match_by_id_and_name(tmp_path):
    path = tmp_path / "a.json"
    known = [{"id": 3, "name": "x"}, {"id": 5, "name": "x"}, {"id": 8, "name": "y"}]
    path.write_text(json.dumps(CONTENT | {"categories": known}))
    assert CocoAnnotations.load(path, known).labels.tolist() == [1, 2, 3, 3, 1, 3]
    other = copy.deepcopy(CONTENT) | {"categories": [{"id": 4, "name": "x"}, *known]}
    other["annotations"][0]["category_id"] = 4
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"does not know by its name \(category 4: 'x'\)"):
        CocoAnnotations.load(path, known)


def test_the_selection_knows_which_classes_are_absent():
    selection = ClassSelection.from_setting(["a", {"b": ["c", "d"]}])
    assert selection.absent(["d"]) == ["a"]
    assert selection.absent(["a", "b"]) == []
    assert selection.categories == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]


@pytest.mark.parametrize("rows", [[1, 0], [0], []])
def test_selected_images_keep_their_objects(splits, rows):
    whole = splits().annotations("train")
    part = whole.select(np.array(rows, dtype=np.int64), min_box_size=10)
    assert part.image_ids.tolist() == [whole.image_ids[row] for row in rows]
    expected = [x for row in rows for x in whole.xywh[whole.offsets[row] : whole.offsets[row + 1], 0]]
    assert part.xywh[:, 0].tolist() == expected
    assert part.offsets[-1] == len(part.labels) == len(part.areas) == len(part.crowds)
    assert not part.usable.any()
    assert not part.is_json


def test_annotations_are_written_as_a_json_that_reads_back_as_the_same(splits, tmp_path):
    found = splits(classes=["person", {"vehicle": ["car"]}]).annotations("train")
    path = tmp_path / "written.json"
    path.write_text(json.dumps(found.to_coco()))
    again = CocoAnnotations.load(path)
    for name in ("image_ids", "file_names", "heights", "widths", "offsets", "labels", "xywh", "areas", "crowds"):
        assert np.array_equal(getattr(again, name), getattr(found, name)), name
    assert again.categories == found.categories
    listing = CocoAnnotations.load(path, found.categories).select(np.array([0]))
    assert "annotations" in listing.to_coco()
