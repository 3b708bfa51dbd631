"""Invalid annotation files and images, one of each kind: how they are reported, and what ``skip`` keeps."""

import copy
import io
import json
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.dataset import CocoDataset
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.samplers import Sample
from cpm_rcnn.data.transforms import Resize
from cpm_rcnn.errors import UserError
from cpm_rcnn.evaluation.coco_metric import CocoMetric

CONTENT = {
    "info": {"contributor": "someone"},
    "images": [{"id": 10 * n, "file_name": f"{n}.png", "height": 80, "width": 100} for n in (1, 2, 3, 4)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": n, "image_id": 10 * (n % 4 + 1), "category_id": n % 2 + 1, "bbox": [50, 40, 5 + n, 6.5], "area": 30}
        for n in range(1, 9)
    ],
}


def put(value, *keys):
    def change(content):
        *path, last = keys
        for key in path:
            content = content[key]
        content[last] = value

    return change


def drop(*keys):
    def change(content):
        *path, last = keys
        for key in path:
            content = content[key]
        del content[last]

    return change


def image(key, value):
    return put(value, "images", 1, key)


def item(key, value):
    return put(value, "annotations", 2, key)


def category(key, value):
    return put(value, "categories", 1, key)


def corners(content):
    for entry in content["annotations"]:
        entry["bbox"] = [20, 30, 90, 79]


def normalized(content):
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [(x + w / 2) / 100, (y + h / 2) / 80, w / 100, h / 80]


def string_ids(key, reference):
    def change(content):
        for entry in content[key]:
            entry["id"] = f"a{entry['id']}"
        for entry in content["annotations"]:
            entry[reference] = f"a{entry[reference]}"

    return change


def all_images_faulty(content):
    for entry in content["images"]:
        entry["height"] = 0


def raw(text):
    return lambda content: text if isinstance(text, bytes) else text.encode()


WHOLE = json.dumps(CONTENT).encode()

# Skipping entries cannot correct these: refused with either value of on_error.
BAD_FILES = {
    "empty file": (raw(""), "not valid JSON"),
    "truncated": (raw(WHOLE[: len(WHOLE) // 2]), "not valid JSON"),
    "text": (raw("image,x1,y1,x2,y2\n"), "not valid JSON"),
    "binary": (raw(bytes(range(256))), "not valid JSON"),
    "latin-1": (raw('{"images": "é"}'.encode("latin-1")), "not valid JSON"),
    "single quotes": (raw("{'images': []}"), "not valid JSON"),
    "trailing comma": (raw(WHOLE[:-1] + b",}"), "not valid JSON"),
    "two documents": (raw(WHOLE + WHOLE), "not valid JSON"),
    "number of 5000 digits": (raw('{"images": ' + "9" * 5000 + "}"), "not valid JSON"),
    "nested too deeply": (raw("[" * 100_000), "nested too deeply"),
    "nested too deeply inside": (raw(WHOLE[:-1] + b', "x": ' + b'{"a":' * 100_000), "nested too deeply"),
    "a list, as results are": (raw("[]"), "not a COCO annotation file (not an object with images"),
    "null": (raw("null"), "not a COCO annotation file (not an object with images"),
    "no images": (drop("images"), "key 'images' is missing"),
    "empty images": (put([], "images"), "'images' is empty"),
    "no categories": (drop("categories"), "key 'categories' is missing"),
    "images by id": (put({"10": {}}, "images"), "'images' is not a list of objects"),
    "annotations null": (put(None, "annotations"), "'annotations' is not a list of objects"),
    "category twice": (category("id", 1), "1 category listed twice (category 1)"),
    "category id string": (category("id", "2"), "1 category whose id is not an integer (categories[1]: '2')"),
    "category id fraction": (category("id", 2.5), "id is not an integer (categories[1]: 2.5)"),
    "category name twice": (
        category("name", "cat"),
        "1 category with the name of an earlier category (category 2: 'cat')",
    ),
    "category name null": (category("name", None), "1 category whose name is not a string (category 2: None)"),
    "category without name": (drop("categories", 1, "name"), "1 category without name (category 2)"),
    "category not an object": (put("dog", "categories", 1), "1 category not written as an object (categories[1])"),
    "empty categories": (put([], "categories"), "'categories' is empty, but each annotation needs one"),
    "string image ids": (
        string_ids("images", "image_id"),
        "the ids of all images are strings (the first is 'a10'), but must be integers; "
        "number the images and use the numbers in image_id",
    ),
    "string category ids": (
        string_ids("categories", "category_id"),
        "the ids of all categories are strings (the first is 'a1'), but must be integers",
    ),
    "boxes from 0 to 1": (
        normalized,
        "the bbox of 8 annotations of 8 is within 0..1; they look normalized (as YOLO's x_center, ",
    ),
    "boxes as corners": (corners, "8 of 8 annotations extend beyond their image .* look like x1, y1, x2, y2"),
    "all images faulty": (all_images_faulty, "4 images whose height .* (image 10: 0, "),
}

# One invalid image (20) or annotation (3).
BAD_ENTRIES = {
    "image not an object": (put(7, "images", 1), "1 image not written as an object (images[1])"),
    "image id missing": (drop("images", 1, "id"), "1 image without id (images[1])"),
    "image id string": (image("id", "20"), "1 image whose id is not an integer (images[1]: '20')"),
    "image id true": (image("id", True), "1 image whose id is not an integer (images[1]: True)"),
    "image id float": (image("id", 20.0), "1 image whose id is not an integer (images[1]: 20.0)"),
    "image id null": (image("id", None), "1 image whose id is not an integer (images[1]: None)"),
    "image id over int64": (image("id", 2**63), "1 image whose id is not an integer (images[1]: 9223"),
    "image twice": (image("id", 10), "1 image listed twice (image 10)"),
    "file name missing": (drop("images", 1, "file_name"), "1 image without file_name (image 20)"),
    "file name a number": (
        image("file_name", 2),
        "file_name is not a string of 1 to 1000 printable characters (image 20: 2)",
    ),
    "file name empty": (
        image("file_name", ""),
        "file_name is not a string of 1 to 1000 printable characters (image 20: '')",
    ),
    "file name with NUL": (image("file_name", "a\0.png"), "file_name is not a string of 1 to 1000 .*image 20: 'a"),
    "file name of two lines": (image("file_name", "a\n.png"), "file_name is not a string of 1 to 1000 .*image 20: 'a"),
    "file name half a surrogate": (image("file_name", "\ud800.png"), "file_name is not a string of 1 .*image 20: '"),
    "file name too long": (image("file_name", "a" * 10**5), "file_name is not a string of 1 to 1000 .*image 20: 'aaa"),
    "file name leaves the folder": (image("file_name", "../2.png"), "leaves the image folder (image 20: '../2.png')"),
    "file name leaves the folder later": (
        image("file_name", "a/../../2.png"),
        "leaves the image folder (image 20: 'a/../",
    ),
    "file name absolute": (image("file_name", "/etc/passwd"), "leaves the image folder (image 20: '/etc/passwd')"),
    "file name on a drive": (image("file_name", "C:2.png"), "leaves the image folder (image 20: 'C:2.png')"),
    "file name by backslash": (image("file_name", "..\\2.png"), "leaves the image folder (image 20: '..\\\\2.png')"),
    "file name on a server": (image("file_name", "\\\\nas\\2.png"), "leaves the image folder (image 20: '"),
    "height missing": (drop("images", 1, "height"), "1 image without height (image 20)"),
    "height zero": (image("height", 0), "height in pixels is not an integer from 1 to 1000000 (image 20: 0)"),
    "height fraction": (image("height", 80.5), "height in pixels is not an integer from 1 to 1000000 (image 20: 80.5)"),
    "width string": (image("width", "100"), "width in pixels is not an integer from 1 to 1000000 (image 20: '100')"),
    "width NaN": (image("width", float("nan")), "width in pixels is not an integer from 1 to 1000000 (image 20: nan)"),
    "width enormous": (
        image("width", 10**7),
        "width in pixels is not an integer from 1 to 1000000 (image 20: 10000000)",
    ),
    "annotation not an object": (put([], "annotations", 2), "1 annotation not written as an object (annotations[2])"),
    "id missing": (drop("annotations", 2, "id"), "1 annotation without id (annotations[2])"),
    "id false": (item("id", False), "1 annotation whose id is not an integer (annotations[2]: False)"),
    "annotation twice": (item("id", 2), "1 annotation listed twice (annotation 2)"),
    "image_id missing": (drop("annotations", 2, "image_id"), "1 annotation without image_id (annotation 3)"),
    "image_id null": (item("image_id", None), "image_id is not an integer (annotation 3: None)"),
    "image unknown": (item("image_id", 5), "1 annotation of an unknown image (annotation 3: 5)"),
    "category_id string": (item("category_id", "cat"), "category_id is not an integer (annotation 3: 'cat')"),
    "category unknown": (item("category_id", 0), "1 annotation of an unknown category (annotation 3: 0)"),
    "bbox missing": (drop("annotations", 2, "bbox"), "1 annotation without bbox (annotation 3)"),
    "bbox of three": (item("bbox", [1, 2, 3]), "bbox is not four finite numbers (annotation 3: [1, 2, 3])"),
    "bbox an object": (item("bbox", {"x": 1}), "bbox is not four finite numbers (annotation 3: {'x': 1})"),
    "bbox of strings": (item("bbox", ["1"] * 4), "bbox is not four finite numbers (annotation 3: ['1', "),
    "bbox of booleans": (item("bbox", [True] * 4), "bbox is not four finite numbers (annotation 3: [True, "),
    "bbox NaN": (item("bbox", [1, 2, float("nan"), 4]), "bbox is not four finite numbers (annotation 3: [1, 2, nan"),
    "bbox infinite": (item("bbox", [float("inf"), 2, 3, 4]), "four finite numbers (annotation 3: [inf"),
    "bbox beyond float": (item("bbox", [1, 2, 3, 10**400]), "bbox is not four finite numbers (annotation 3: [1, "),
    "bbox nested": (item("bbox", [[[[[[[[1]]]]]]]] * 4), "bbox is not four finite numbers (annotation 3: [["),
    "width negative": (item("bbox", [1, 2, -3, 4]), "negative width or height (annotation 3: [1, 2, -3, 4])"),
    "height negative": (item("bbox", [1, 2, 3, -0.1]), "negative width or height (annotation 3: [1, 2, 3, -0.1])"),
    "box right of image": (item("bbox", [101, 2, 3, 4]), "lies outside its image (annotation 3: [101, 2, 3, 4])"),
    "box above image": (item("bbox", [1, -9, 3, 4]), "lies outside its image (annotation 3: [1, -9, 3, 4])"),
    "area null": (item("area", None), "area is not a finite number of at least 0 (annotation 3: None)"),
    "area negative": (item("area", -1), "area is not a finite number of at least 0 (annotation 3: -1)"),
    "area NaN": (item("area", float("nan")), "area is not a finite number of at least 0 (annotation 3: nan)"),
    "iscrowd string": (item("iscrowd", "0"), "iscrowd is neither 0 nor 1 (annotation 3: '0')"),
    "iscrowd two": (item("iscrowd", 2), "iscrowd is neither 0 nor 1 (annotation 3: 2)"),
}

GOOD = {
    "additional keys": put({"x": [None]}, "annotations", 2, "attributes"),
    "invalid segmentation": item("segmentation", float("nan")),
    "crowd without area or segmentation": lambda content: content["annotations"].__setitem__(
        2, {"id": 3, "image_id": 10, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 1}
    ),
    "no id in any annotation": lambda content: [entry.pop("id") for entry in content["annotations"]],
    "ids of 0, below 0 and above 2**53": lambda content: [
        put(value, "annotations", row, "id")(content) for row, value in enumerate([0, -1, 2**53 + 1])
    ],
    "one box of a pixel in the corner": item("bbox", [0, 0, 1, 1]),
    "smallest and largest int64 ids": lambda content: (
        item("id", 2**63 - 1)(content),
        put(-(2**63), "annotations", 3, "id")(content),
    ),
    "box partly outside": item("bbox", [-5, 70, 20, 20]),
    "unicode file name": image("file_name", "фото/日本 🐈\u200d⬛.png"),
    "file name through a folder and back": image("file_name", "a/../b/./2..png"),
    "iscrowd true": item("iscrowd", True),
}


@pytest.fixture
def load(tmp_path):
    def load(change, on_error="raise", folder=None):
        content = copy.deepcopy(CONTENT)
        changed = change(content)
        path = tmp_path / "instances.json"
        path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(content).encode())
        return CocoAnnotations.load(path, on_error=on_error, folder=folder)

    return load


def says(text, message):
    """Whether ``text`` is one line that contains ``message``, in which ``.*`` matches anything."""
    pattern = ".*".join(map(re.escape, message.split(".*")))
    return re.search(pattern, text) is not None and len(text.splitlines()) == 1


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_an_invalid_file_is_refused_with_either_value_of_on_error(load, case, on_error):
    change, message = BAD_FILES[case]
    with pytest.raises(UserError) as error:
        load(change, on_error)
    assert says(str(error.value), f"instances.json: .*{message}")


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_an_invalid_entry_is_refused_by_id(load, case):
    change, message = BAD_ENTRIES[case]
    with pytest.raises(UserError) as error:
        load(change)
    assert says(str(error.value), f"instances.json: .*{message}")


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_skip_skips_the_invalid_entry_and_reports_it_once(load, case, caplog):
    change, message = BAD_ENTRIES[case]
    loaded = load(change, "skip")
    assert len(caplog.messages) == 1
    assert says(caplog.messages[0], f"instances.json: on_error=skip: skipped .*{message}")
    numbers = sorted(int(width) - 5 for width in loaded.xywh[:, 2])
    if "image" in message.split("(")[-1]:
        assert loaded.image_ids.tolist() == [10, 30, 40]
        assert numbers == [2, 3, 4, 6, 7, 8]  # 1 and 5 belong to image 20
    else:
        assert loaded.image_ids.tolist() == [10, 20, 30, 40]
        assert numbers == [1, 2, 4, 5, 6, 7, 8]
    # Evaluation skips the same entries.
    metric = CocoMetric(loaded, loaded.categories)
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    metric.update(loaded.image_ids.tolist(), [nothing] * len(loaded))
    assert metric.compute()["AP"] == 0


@pytest.mark.parametrize("case", GOOD)
def test_unusual_but_valid_files_are_accepted(load, case, caplog):
    loaded = load(GOOD[case])
    assert len(loaded.labels) == 8
    assert caplog.messages == []


def test_all_faults_are_reported_in_one_line(load):
    def change(content):
        for fault in ("height zero", "bbox of three", "iscrowd two", "file name leaves the folder"):
            BAD_ENTRIES[fault][0](content)
        for entry in content["annotations"][4:]:
            entry["category_id"] = 7

    with pytest.raises(UserError) as error:
        load(change)
    assert str(error.value).count("; ") == 5
    first = "(annotation 5: 7, annotation 6: 7, annotation 7: 7, ...)"
    assert says(str(error.value), f"image 20: '../.*image 20: 0.*4 annotations of an unknown category {first}; 1 anno")


def test_boxes_that_extend_a_little_beyond_the_image_are_not_taken_for_corners(load, caplog):
    def change(content):
        for number, entry in enumerate(content["annotations"]):
            entry["bbox"] = [90, 10, 15, 20] if number % 2 else [0, 0, 30, 20]

    assert len(load(change).labels) == 8
    assert caplog.messages == []


def test_boxes_of_one_pixel_are_not_taken_for_normalized_ones(load):
    def change(content):
        for entry in content["annotations"]:
            entry["bbox"] = [0, 0, 1, 1]

    assert len(load(change).labels) == 8


@pytest.mark.parametrize("name", ["{folder}/2.png", "{folder}/a/../2.png", "{link}/2.png"])
def test_an_absolute_file_name_inside_the_image_folder_becomes_relative(load, tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    name = name.format(folder=tmp_path / "images", link=tmp_path / "link")
    loaded = load(image("file_name", name), folder=tmp_path / ("link" if "link" in name else "images"))
    assert loaded.file_names.tolist() == ["1.png", "2.png", "3.png", "4.png"]
    loaded = load(image("file_name", str(tmp_path / "images/2.png")), folder=tmp_path / "link")
    assert loaded.file_names[1] == "2.png"


@pytest.mark.parametrize("name", ["{folder}/../2.png", "{folder}2/2.png", "/etc/passwd", "{folder}"])
def test_an_absolute_file_name_outside_the_image_folder_is_refused(load, tmp_path, name):
    name = name.format(folder=tmp_path / "images")
    with pytest.raises(UserError, match=r"1 image whose file_name leaves the image folder \(image 20: "):
        load(image("file_name", name), folder=tmp_path / "images")


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def picture(width=100, height=80, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png_of_size(width, height):
    """A PNG that claims to have this size but contains almost no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def damaged(raw, position):
    raw = bytearray(raw)
    raw[position] ^= 0xFF
    return bytes(raw)


JPEG, PNG = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
BAD_IMAGES = {
    "empty": (b"", "2.png is empty, a file of 0 bytes"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "2.png is damaged or not an image"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "2.png is damaged or not an image"),
    "drawing": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "2.png is damaged or not an image"),
    "program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 80\n%%EndComments\n", "2.png is damaged or not an"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "2.png ends early; .*% of its pixels are lost"),
    "JPEG header": (JPEG[:200], "2.png is damaged or not an image"),
    "truncated PNG": (PNG[: len(PNG) // 2], "2.png is damaged or not an image"),
    "PNG header": (PNG[:33], "2.png is damaged or not an image"),
    "damaged PNG": (damaged(PNG, len(PNG) // 2), "2.png is damaged or not an image"),
    "truncated GIF": (encoded(picture(), "GIF")[:900], "2.png is damaged or not an image"),
    "truncated WebP": (encoded(picture(), "WEBP")[:900], "2.png is damaged or not an image"),
    "truncated TIFF": (encoded(picture(), "TIFF")[:900], "2.png is damaged or not an image"),
    "truncated BMP": (encoded(picture(), "BMP")[:900], "2.png is damaged or not an image"),
    "gigapixel PNG": (png_of_size(50_000, 50_000), "2.png is too large to read (Image size (2500000000 pixels)"),
    "other size": (encoded(picture(101, 80), "PNG"), "2.png is 101 x 80 pixels, but the annotations say 100 x 80"),
    "other way round": (encoded(picture(80, 100), "PNG"), "2.png is 80 x 100 pixels, but the annotations say 100 x 80"),
    "other size and large": (png_of_size(13_000, 13_000), "2.png is 13000 x 13000 pixels, but the annotations say"),
    "fractions": (encoded(picture(mode="F"), "TIFF"), "2.png has 32 bits per channel with an unknown range"),
    "32-bit": (
        encoded(Image.fromarray(np.full((80, 100), 1 << 20, np.int32)), "TIFF"),
        "2.png has 32 bits per channel",
    ),
    "missing": (None, "image 2.png not found"),
}


@pytest.fixture
def dataset(load, tmp_path):
    def dataset(raw, zipped, on_error="raise", replacements=None):
        files = {f"{n}.png": encoded(picture(), "PNG") for n in (1, 3, 4)}
        if raw is not None:
            files["2.png"] = raw
        path = tmp_path / ("images.zip" if zipped else "images")
        if zipped:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        else:
            path.mkdir()
            for name, content in files.items():
                (path / name).write_bytes(content)
        annotations = load(lambda content: None)
        return CocoDataset(
            annotations,
            ImageSource(path),
            [Resize(80, 100)],
            CONTINUOUS,
            on_error=on_error,
            replacements=replacements,
        )

    return dataset


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_an_unreadable_image_is_refused_by_file_and_id(dataset, case, zipped):
    raw, message = BAD_IMAGES[case]
    with pytest.raises(UserError) as error:
        dataset(raw, zipped)[1]
    source = "images.zip" if zipped else "images"
    assert says(str(error.value), f"{source}: {message}.* (image 20 of .*instances.json)")


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_skip_in_training_returns_the_next_image_and_reports_it_once(dataset, case, caplog):
    raw, message = BAD_IMAGES[case]
    data = dataset(raw, False, "skip", np.arange(4))
    for _ in range(2):
        image, target = data[Sample(1, 5)]
        assert target["image_id"] == 30
        assert torch.equal(image, data[Sample(2, 5)][0])
        assert len(target["boxes"]) == 2
    assert len(caplog.messages) == 1
    assert says(
        caplog.messages[0],
        f"{message}.* (image 20 of .*; replaced by another image (on_error=skip, unreadable so far: 1)",
    )


def test_skip_in_evaluation_returns_a_black_image_marked_unreadable(dataset, caplog):
    data = dataset(b"", False, "skip")
    image, target = data[1]
    assert image.sum() == 0
    assert target["image_id"] == 20
    assert target["original_size"] == (80, 100)
    assert not target["readable"]
    assert data[2][1]["readable"]
    assert "2.png is empty, a file of 0 bytes" in caplog.text
    assert "counts as an image without detections" in caplog.text


def test_replacements_are_the_next_training_images_cyclically_with_the_same_orientation_first(dataset):
    data = dataset(b"", False, "skip", np.array([0, 1, 3]))
    assert data._replacements_of(1) == [3, 0]
    assert data._replacements_of(3) == [0, 1]
    data.annotations.heights[[1, 0]] = 120
    assert data._replacements_of(1) == [0, 3]


def test_training_fails_if_no_image_can_be_read(dataset):
    data = dataset(b"", False, "skip", np.array([1]))
    with pytest.raises(UserError, match="images: none of the training images can be read"):
        data[1]


@pytest.mark.parametrize("fault", ["encrypted", "damaged"])
def test_an_unreadable_archive_member_is_refused_by_file_and_id(dataset, tmp_path, fault):
    data = dataset(PNG, True)
    raw = bytearray((tmp_path / "images.zip").read_bytes())
    data.images._files._opened = None
    at = raw.index(b"PK\x01\x02", raw.index(b"2.png"))
    while raw[at + 46 : at + 51] != b"2.png":
        at = raw.index(b"PK\x01\x02", at + 1)
    if fault == "encrypted":
        raw[at + 8] |= 1
    else:
        raw[at + 16] ^= 0xFF
    (tmp_path / "images.zip").write_bytes(raw)
    with pytest.raises(UserError) as error:
        data[1]
    assert says(str(error.value), "images.zip: 2.png cannot be read from the archive (image 20 of ")


@pytest.mark.parametrize("name", ["a" * 900, "folder", "2.png/x"])
def test_a_file_name_that_cannot_be_read_is_refused_by_id(load, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "2.png").write_bytes(PNG)
    annotations = load(image("file_name", name))
    with pytest.raises(UserError) as error:
        CocoDataset(annotations, ImageSource(tmp_path), [Resize(80, 100)], CONTINUOUS)[1]
    assert says(str(error.value), "cannot be read .* (image 20 of ")
    assert len(str(error.value)) < 600
