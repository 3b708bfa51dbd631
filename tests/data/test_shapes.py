import json
import threading

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from cpm_rcnn.data import shapes
from cpm_rcnn.data.shapes import CATEGORIES, render, write_shapes
from cpm_rcnn.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, 6, 3)
    return root


def drawn(count=60):
    return [render(np.random.default_rng([9, number])) for number in range(count)]


@pytest.fixture(scope="module")
def images():
    return drawn()


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_same_arguments_give_the_same_bytes(root, tmp_path):
    write_shapes(tmp_path / "again", 6, 3)
    assert files(tmp_path / "again") == files(root)


def test_a_larger_data_set_starts_with_the_same_images_and_splits_differ(root, tmp_path):
    write_shapes(tmp_path / "longer", 7, 3)
    longer = files(tmp_path / "longer")
    assert all(longer[name] == raw for name, raw in files(root).items() if name.suffix == ".jpg")
    assert (root / "train/000001.jpg").read_bytes() != (root / "val/000001.jpg").read_bytes()


def test_another_seed_gives_other_images(root, tmp_path):
    write_shapes(tmp_path / "other", 6, 3, seed=1)
    assert (tmp_path / "other/train/000001.jpg").read_bytes() != (root / "train/000001.jpg").read_bytes()


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 3)])
def test_json_is_in_coco_format_with_the_sizes_of_the_files(root, split, count, capsys):
    coco = COCO(root / f"annotations/instances_{split}.json")
    assert len(coco.getImgIds()) == count
    assert coco.loadCats(coco.getCatIds()) == CATEGORIES
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(root / split / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])
        for item in coco.imgToAnns[image["id"]]:
            x, y, width, height = item["bbox"]
            assert x >= 0 <= y
            assert x + width <= image["width"]
            assert y + height <= image["height"]


def test_boxes_are_tight_around_the_visible_pixels_and_areas_count_them(images):
    for pixels, objects, owner in images:
        assert pixels.dtype == np.uint8
        assert set(np.unique(owner)) - {-1} == set(range(len(objects)))
        for number, item in enumerate(objects):
            x, y, width, height = item["bbox"]
            mask = owner == number
            inside = mask[y : y + height, x : x + width]
            assert mask.sum() == inside.sum() == item["area"]
            assert inside[0].any() & inside[-1].any() & inside[:, 0].any() & inside[:, -1].any()


def test_shapes_contrast_with_the_background(images):
    pixels, objects, owner = images[0]
    for number in range(len(objects)):
        mask = owner == number
        assert np.abs(pixels[mask].mean(axis=0) - pixels[owner == -1].mean(axis=0)).sum() > 60


def test_images_cover_all_classes_sizes_and_orientations_crowds_and_no_objects(images):
    objects = [item for _, listed, _ in images for item in listed]
    areas = np.array([item["area"] for item in objects if not item["iscrowd"]])
    assert {item["category_id"] for item in objects} == {1, 2, 3, 4, 5}
    assert np.mean(areas < 32**2) > 0.2
    assert np.mean((areas >= 32**2) & (areas < 96**2)) > 0.2
    assert np.mean(areas >= 96**2) > 0.05
    assert any(item["iscrowd"] for item in objects)
    assert any(not listed for _, listed, _ in images)
    assert {pixels.shape[0] > pixels.shape[1] for pixels, _, _ in images} == {False, True}


def test_a_complete_data_set_is_not_rendered_again(root, monkeypatch):
    monkeypatch.setattr(shapes, "_write_split", None)
    write_shapes(root, 6, 3)


def test_a_data_set_made_with_other_arguments_is_refused(root):
    with pytest.raises(UserError, match=r"^root=.*shapes: contains shapes made with .*choose another folder") as error:
        write_shapes(root, 6, 4)
    assert "\n" not in str(error.value)


def test_a_folder_with_other_content_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"^root=.*: not empty and not a shapes data set"):
        write_shapes(tmp_path, 6, 3)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_root_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/shapes: cannot be written \(Not a directory\)"):
        write_shapes(tmp_path / "file" / "shapes", 1, 1)


def test_concurrent_calls_leave_one_complete_data_set(root, tmp_path):
    threads = [threading.Thread(target=write_shapes, args=(tmp_path / "set", 6, 3)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(tmp_path / "set") == files(root)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_background", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shapes(tmp_path / "set", 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_marker_records_the_arguments(root):
    assert json.loads((root / "shapes.json").read_text()) == {
        "version": 1,
        "train_images": 6,
        "val_images": 3,
        "seed": 0,
    }
