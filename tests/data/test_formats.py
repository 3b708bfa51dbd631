"""Folders in COCO's, YOLO's, VOC's and CVAT's format: the same batches as from their COCO twin, and their faults."""

import copy
import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.data.formats import find_layout
from cpm_rcnn.data.settings import DataSettings
from cpm_rcnn.data.shapes import CLASSES
from cpm_rcnn.data.splits import DataSplits
from cpm_rcnn.errors import UserError
from dataset_folders import (
    NAMES,
    cvat_xml,
    shapes,
    write_coco,
    write_cvat,
    write_voc,
    write_yolo,
)

TWIN = {
    "train_json": "annotations/instances_train.json",
    "train_images": "train",
    "val_json": "annotations/instances_val.json",
    "val_images": "val",
}
OPTIONS = {
    **{"num_workers": 0, "short_sides": (64, 80), "max_size": 120, "test_short_side": 64, "test_max_size": 120},
    **{"batch_size": 3, "max_steps": 6},
}
LAYOUTS = [
    *((write_coco, layout) for layout in ("roboflow", "annotations")),
    *((write_voc, layout) for layout in ("devkit", "flat")),
    *((write_yolo, layout) for layout in ("ultralytics", "roboflow", "lists")),
    *((write_cvat, layout) for layout in ("subsets", "folders")),
]
# VOC's format has no order of the classes.
ORDER = {write_voc: {"classes": list(CLASSES)}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tmp_path_factory.mktemp("formats") / "shapes"


@pytest.fixture(scope="module")
def contents(source):
    return shapes(source)


@pytest.fixture(scope="module")
def twin(source, contents):
    """The batches of both splits from COCO's format."""
    return batches(CocoDataModule(root=str(source), **TWIN, **OPTIONS))


def batches(data):
    data.setup("fit")
    return [*data.train_dataloader(), *data.val_dataloader()]


def same(batch, other):
    return all(itertools.starmap(torch.equal, zip(batch[0], other[0], strict=True))) and all(
        torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["labels"], b["labels"]) and a["image_id"] == b["image_id"]
        for a, b in zip(batch[1], other[1], strict=True)
    )


def splits(root, **settings):
    return DataSplits(DataSettings(root=str(root), **settings))


def boxes(annotations):
    return annotations.xywh.tolist()


@pytest.mark.parametrize(("write", "layout"), LAYOUTS)
def test_every_layout_gives_the_batches_of_its_coco_twin_to_the_last_bit(
    source, contents, twin, tmp_path, write, layout
):
    root = write(tmp_path / "data", source, contents, layout)
    data = CocoDataModule(root=str(root), **OPTIONS, **ORDER.get(write, {}))
    assert all(same(*pair) for pair in zip(batches(data), twin, strict=True))
    # A checkpoint stores what finds the same validation images.
    again = CocoDataModule(**data.evaluation_arguments, categories=data.categories)
    assert all(same(*pair) for pair in zip(again.val_dataloader(), data.val_dataloader(), strict=True))


def test_voc_s_difficult_objects_are_crowds(source, contents, tmp_path):
    marked = copy.deepcopy(contents)
    marked["train"]["annotations"][1]["iscrowd"] = 1
    found = splits(write_voc(tmp_path, source, marked)).annotations("train")
    assert np.flatnonzero(found.crowds).tolist() == [1]
    assert np.flatnonzero(~found.usable).tolist() == [1]
    assert boxes(found) == boxes(splits(source, **TWIN).annotations("train"))


def test_folders_that_hotcoco_writes_are_read_back(source, contents, tmp_path):
    hotcoco = pytest.importorskip("hotcoco")
    written = hotcoco.COCO(str(source / TWIN["train_json"]))
    expected = splits(source, **TWIN).annotations("train")
    for folder, images in (("voc", "JPEGImages"), ("yolo", "images/train"), ("cvat", "images")):
        shutil.copytree(source / "train", tmp_path / folder / images)
    written.to_voc(str(tmp_path / "voc"))
    written.to_cvat(str(tmp_path / "cvat/annotations.xml"))
    labels = tmp_path / "yolo/labels/train"
    labels.mkdir(parents=True)
    written.to_yolo(str(labels))
    description = (labels / "data.yaml").read_text()
    (tmp_path / "yolo/data.yaml").write_text(f"train: images/train\n{description}")
    for name in ("voc", "yolo", "cvat"):
        found = splits(tmp_path / name, classes=list(CLASSES)).annotations("train")
        assert boxes(found) == boxes(expected), name
        assert found.labels.tolist() == expected.labels.tolist(), name


def test_yolo_s_six_digits_recover_edges_on_whole_pixels_and_on_hundredths(tmp_path):
    width, height, count = 6000, 4000, 2000
    corners = np.random.default_rng(0).integers(0, 100 * np.array([[[width]], [[height]]]), (2, 2, count))
    corners[..., :1500] -= corners[..., :1500] % 100
    (x1, x2), (y1, y2) = np.sort(corners, axis=1) / 100
    expected = np.stack([x1, y1, (x2 - x1).round(2), (y2 - y1).round(2)], axis=1).tolist()
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("1", (width, height)).save(tmp_path / "images/a.png")
    lines = [
        f"0 {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}"
        for x, y, w, h in expected
    ]
    (tmp_path / "labels/a.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text("train: images\nnames: [thing]")
    assert boxes(splits(tmp_path).annotations("train")) == expected


# --- faults: each changes a valid folder; the message names the file, and the line if there is one ---


def text(name, *replacements):
    """Replace text in a file."""

    def change(root):
        content = (root / name).read_text()
        for old, new in replacements:
            assert old in content
            content = content.replace(old, new, 1)
        (root / name).write_text(content)

    return change


def line(name, number, new):
    """Replace a line of a file; lines are counted from 1."""

    def change(root):
        lines = (root / name).read_text().splitlines()
        lines[number - 1] = new
        (root / name).write_text("\n".join(lines))

    return change


def rewritten(name, new):
    return lambda root: (root / name).write_bytes(new if isinstance(new, bytes) else new.encode())


def removed(name):
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def emptied(folder, suffix):
    def change(root):
        for path in (root / folder).glob(f"*{suffix}"):
            path.unlink()

    return change


VOC, YOLO, CVAT = (
    (write_voc, "devkit", "Annotations/train_000001.xml"),
    (write_yolo, "ultralytics", "labels/train/000001.txt"),
    (write_cvat, "subsets", "annotations.xml"),
)
# Entries that on_error=skip skips.
FAULTS = {
    "xml not well-formed": (VOC, text(VOC[2], ("</size>", "</siz>")), "{file} line 3: mismatched tag"),
    "xml cut off": (VOC, text(VOC[2], ("</annotation>", "")), "{file} line"),
    "xml empty": (VOC, rewritten(VOC[2], ""), "{file} line 1: no element found"),
    "xml binary": (VOC, rewritten(VOC[2], bytes(range(256))), "{file} line 1: not well-formed"),
    "xml of another format": (VOC, rewritten(VOC[2], "<root/>"), "line 1: the root is <root>, not <annotation>"),
    "xml with entities": (
        VOC,
        rewritten(VOC[2], '<!DOCTYPE a [<!ENTITY a "aa">]><annotation>&a;</annotation>'),
        "{file} line 1: has a document type definition",
    ),
    "voc name missing": (VOC, text(VOC[2], ("<name>cross</name>", "")), "1 object without a name ({file} line 4)"),
    "voc corner not a number": (
        VOC,
        text(VOC[2], ("<xmin>82<", "<xmin>a<")),
        "1 object whose xmin, ymin, xmax, ymax are not four numbers ({file} line 4: 'a', '39', '241', '167')",
    ),
    "voc corner missing": (VOC, text(VOC[2], ("<ymin>39</ymin>", "")), "({file} line 4: '82', '', '241', '167')"),
    "voc corners swapped": (
        VOC,
        text(VOC[2], ("<xmin>82<", "<xmin>250<")),
        "1 object whose xmax or ymax is below xmin or ymin ({file} line 4: 250, 39, 241, 167)",
    ),
    "voc box outside": (
        VOC,
        text(VOC[2], ("<xmin>82<", "<xmin>500<"), ("<xmax>241<", "<xmax>600<")),
        "1 annotation whose bbox lies outside its image ({file} line 4: [499.0, 38.0, 101.0, 129.0])",
    ),
    "voc list without xml": (
        VOC,
        text("ImageSets/Main/train.txt", ("train_000002", "train_999")),
        "1 image without an XML file (Annotations/train_999.xml)",
    ),
    "voc size and image missing": (
        VOC,
        lambda root: (text(VOC[2], ("<width>269", "<width>0"))(root), removed("JPEGImages/train_000001.jpg")(root)),
        "1 image whose size is neither in the XML nor readable ({file}: image train_000001.jpg not found)",
    ),
    "yolo unknown class": (YOLO, line(YOLO[2], 7, "99 .5 .5 .1 .1"), "data.yaml does not name ({file} line 7: 99)"),
    "yolo four values": (YOLO, line(YOLO[2], 2, "1 .5 .5 .1"), "or a polygon after the class ({file} line 2: 4 v"),
    "yolo with scores": (YOLO, line(YOLO[2], 2, "1 .5 .5 .1 .1 .9"), "({file} line 2: 6 values)"),
    "yolo not a number": (YOLO, line(YOLO[2], 3, "1 .5 .5 x .1"), "not a number ({file} line 3: 1 .5 .5 x .1)"),
    "yolo class name": (YOLO, line(YOLO[2], 3, "cat .5 .5 .1 .1"), "not a number ({file} line 3: cat .5 .5 .1 .1)"),
    "yolo nan": (YOLO, line(YOLO[2], 3, "1 .5 .5 nan .1"), "not fractions of the image, from 0 to 1 ({file} line 3: 1"),
    "yolo pixels": (YOLO, line(YOLO[2], 1, "1 50 60 20 30"), "fractions of the image, from 0 to 1 ({file} line 1: 1"),
    "yolo binary labels": (YOLO, rewritten(YOLO[2], b"\xff\xfe\x00"), "/{file}: is not text in UTF-8"),
    "yolo damaged image": (
        YOLO,
        rewritten("images/train/000001.jpg", "text"),
        "1 image that cannot be read (images/train/000001.jpg is damaged",
    ),
    "yolo listed image missing": (
        (write_yolo, "lists", ""),
        removed("images/train/000002.jpg"),
        "1 image that cannot be read (image images/train/000002.jpg not found, train.txt line 2)",
    ),
    "cvat unknown label": (
        CVAT,
        text(CVAT[2], ('<box label="cross"', '<box label="crow"')),
        "1 object with a label that <meta> does not list (line 6: 'crow')",
    ),
    "cvat without coordinates": (
        CVAT,
        text(CVAT[2], ('xtl="81.00"', "")),
        "1 object without valid coordinates (line 6: box)",
    ),
    "cvat box outside": (
        CVAT,
        text(CVAT[2], ('xtl="81.00"', 'xtl="-90"'), ('xbr="241.00"', 'xbr="-80"')),
        "1 annotation whose bbox lies outside its image (line 6: [-90.0,",
    ),
    "cvat width below 1": (
        CVAT,
        lambda root: (
            text(CVAT[2], ('width="269"', 'width="0"'))(root),
            removed("images/Train/000001.jpg")(root),
        ),
        "1 image whose size is neither in the XML nor readable (line 5: image 000001.jpg not found)",
    ),
}
# Faults of the data set as a whole, which cannot be skipped.
REFUSED = {
    "voc empty list": (VOC, rewritten("ImageSets/Main/train.txt", "\n \n"), "train.txt: is empty, but must list"),
    "voc all xml invalid": (
        VOC,
        lambda root: [rewritten(f"Annotations/{path.name}", "<annotation>")(root) for path in root.glob("*/*.xml")],
        "train.txt: no image is valid; 12 files that cannot be read (Annotations/train_000001.xml line 1:",
    ),
    "yolo no labels": (YOLO, removed("labels/train"), "/data.yaml: no image has a label file; expected for example /"),
    "yolo split folder missing": (
        YOLO,
        removed("images/train"),
        "/data.yaml: train names images/train, but there is no /",
    ),
    "yolo empty split": (YOLO, emptied("images/train", ".jpg"), "/images/train: has no images"),
    "yolo yaml invalid": (YOLO, rewritten("data.yaml", "names: [a\ntrain: x"), "/data.yaml line 2: not valid YAML ("),
    "yolo names wrong": (
        YOLO,
        rewritten("data.yaml", "names: 3\ntrain: images"),
        "/data.yaml: names is neither a list of class names nor a mapping",
    ),
    "yolo names twice": (YOLO, rewritten("data.yaml", "names: [a, a]\ntrain: images"), "the same name for several"),
    "yolo nc differs": (YOLO, rewritten("data.yaml", "names: [a, b]\nnc: 3"), "/data.yaml: nc is 3, but names has 2"),
    "yolo no paths": (YOLO, rewritten("data.yaml", "names: [a, b]"), "/data.yaml: has no train, val or test with"),
    "yolo path not text": (YOLO, rewritten("data.yaml", "names: [a]\ntrain: 3"), "train is neither a path nor a list"),
    "yolo two yamls": (
        YOLO,
        lambda root: (
            shutil.copy(root / "data.yaml", root / "a.yaml"),
            (root / "data.yaml").rename(root / "b.yaml"),
        ),
        ": a.yaml, b.yaml all name classes; call one data.yaml",
    ),
    "yolo without names": (YOLO, removed("data.yaml"), "has labels/ of YOLO's format, but no data.yaml or classes.txt"),
    "cvat not well-formed": (CVAT, text(CVAT[2], ("</labels>", "")), "annotations.xml line 4: mismatched tag"),
    "cvat for video": (
        CVAT,
        text(CVAT[2], ("</annotations>", "<track/></annotations>")),
        "annotations.xml: is in the format 'CVAT for video'; export it as 'CVAT for images 1.1'",
    ),
    "cvat subset": (
        CVAT,
        text(CVAT[2], ('subset="Train"', 'subset="batch 7"')),
        "annotations.xml: subset 'batch 7': must be named train, validation or test",
    ),
    "coco two jsons": (
        (write_coco, "annotations", ""),
        lambda root: shutil.copy(*(root / f"annotations/instances_train{year}.json" for year in ("2020", ""))),
        "instances_train.json, instances_train2020.json may all be those of the train split; name one with train_json=",
    ),
    "coco no images": (
        (write_coco, "annotations", ""),
        removed("images"),
        "instances_train2020.json: no folder of its images in",
    ),
    "nothing": (VOC, lambda root: [removed(path.name)(root) for path in root.iterdir()], "; it has nothing"),
    "something else": (
        VOC,
        lambda root: [*(removed(path.name)(root) for path in list(root.iterdir())), rewritten("a.csv", "x")(root)],
        "no data set in a known format (coco: annotations/*.json with images/, ",
    ),
    "two formats": (
        VOC,
        lambda root: rewritten("data.yaml", "names: [a]\ntrain: JPEGImages")(root),
        "has data sets in several formats, yolo (data.yaml) and voc (Annotations/*.xml); choose one with format=NAME",
    ),
}


@pytest.fixture
def damaged(source, contents, tmp_path):
    def damaged(kind, change):
        write, layout, _ = kind
        root = write(tmp_path / "data", source, contents, layout)
        change(root)
        return root

    return damaged


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_refused_with_its_file_and_line_and_can_be_skipped(damaged, case, caplog):
    kind, change, message = FAULTS[case]
    root = damaged(kind, change)
    with pytest.raises(UserError) as error:
        splits(root).annotations("train")
    expected = message.format(file=kind[2])
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    loaded = splits(root, on_error="skip").annotations("train")
    assert len(loaded) >= 11
    assert sum(expected in each for each in caplog.messages) == 1


@pytest.mark.parametrize("case", REFUSED)
def test_a_data_set_that_cannot_be_read_is_refused_in_one_line(damaged, case):
    kind, change, message = REFUSED[case]
    root = damaged(kind, change)
    with pytest.raises(UserError) as error:
        splits(root, on_error="skip").annotations("train")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_faults_of_several_files_are_reported_together(source, contents, tmp_path):
    root = write_yolo(tmp_path, source, contents)
    for number in (1, 2, 3, 4):
        line(f"labels/train/00000{number}.txt", 1, "7 .5 .5 .1 .1")(root)
    line("labels/train/000005.txt", 1, "1 .5 .5 .1")(root)
    with pytest.raises(UserError) as error:
        splits(root).annotations("train")
    first = ", ".join(f"labels/train/00000{number}.txt line 1: 7" for number in (1, 2, 3))
    expected = f"4 labels with a class id that data.yaml does not name ({first}, ...); 1 label without a box"
    assert expected in str(error.value)


# --- unusual but valid ---


def yolo_folder(root, label, description="names: [a, b]", size=(200, 100), **files):
    """One image of ``size`` with ``label`` as the text of its label file, and other files by their names."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(root / "images/i.png")
    (root / "labels/i.txt").write_bytes(label.encode())
    (root / "data.yaml").write_text(f"{description}\ntrain: images\n")
    for name, content in files.items():
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("label", "description", "expected"),
    [
        ("1 0.5 0.5 0.1 0.2\r\n", "names: {0: a, 1: b}", [[90, 40, 20, 20]]),
        ("\ufeff1\t0.5   0.5 0.1 0.2\n\n\n", "names: [a, b]", [[90, 40, 20, 20]]),
        ("0 .1 .1 .2 .1 .2 .5 .15 .6", "names: [a, b]", [[20, 10, 20, 50]]),
        ("0 .5 .5 .1 .2 .1 .1 2 .3 .3 1", "names: [a, b]\nkpt_shape: [2, 3]", [[90, 40, 20, 20]]),
        ("0 0.5 0.5 1.002 1.002", "names: [a, b]", [[-0.2, -0.1, 200.4, 100.2]]),
        ("1.0 0.5 0.5 0.1 0.2", "names: [a, b]", [[90, 40, 20, 20]]),
        ("0 0.1 0.1 0.0 0.1\n1 .5 .5 .5 .5", "names: [3, true]\nnc: 2", [[20, 5, 0, 10], [50, 25, 100, 50]]),
    ],
    ids=[
        "crlf and mapping",
        "byte order mark",
        "polygon",
        "keypoints",
        "slightly outside",
        "class as a fraction",
        "without area",
    ],
)
def test_unusual_yolo_labels_are_read(tmp_path, label, description, expected):
    assert boxes(splits(yolo_folder(tmp_path, label, description)).annotations("train")) == expected


def test_yolo_s_fractions_are_of_the_upright_image(tmp_path):
    root = yolo_folder(tmp_path, "0 0.25 0.5 0.5 1")
    (root / "images/i.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (200, 100)).save(root / "images/i.jpg", exif=exif)
    found = splits(root)
    assert boxes(found.annotations("train")) == [[0, 0, 50, 200]]
    assert found.images("train").read("images/i.jpg", (200, 100)).shape == (3, 200, 100)


def test_yolo_without_a_yaml_takes_its_classes_from_a_text_file(source, contents, tmp_path):
    root = write_yolo(tmp_path, source, contents)
    expected = boxes(splits(root).annotations("val"))
    (root / "data.yaml").unlink()
    (root / "labels/classes.txt").write_text("\n".join(NAMES.values()))
    found = splits(root)
    assert boxes(found.annotations("val")) == expected
    assert found.categories == [{"id": key, "name": name} for key, name in NAMES.items()]


def test_yolo_labels_may_be_beside_their_images(tmp_path):
    root = yolo_folder(tmp_path, "0 .5 .5 .1 .2", "names: [a]")
    (root / "data.yaml").write_text("names: [a]\ntrain: flat\n")
    (root / "images").rename(root / "flat")
    (root / "labels/i.txt").rename(root / "flat/i.txt")
    assert boxes(splits(root).annotations("train")) == [[90, 40, 20, 20]]


def test_images_without_and_labels_without_their_counterpart_are_noted(source, contents, tmp_path, caplog):
    root = write_yolo(tmp_path, source, contents)
    for number in (1, 2):
        (root / f"labels/val/00000{number}.txt").unlink(missing_ok=True)
    (root / "labels/val/none.txt").write_text("")
    found = splits(root).annotations("val")
    assert len(found) == 5
    assert set(found.images_without_objects().tolist()) >= {0, 1}
    assert "images without a label file, taken as without objects (images/val/000001.jpg, " in caplog.text
    assert "1 label file without an image (labels/val/none.txt)" in caplog.text


def test_paths_of_a_yaml_may_leave_its_folder(source, contents, tmp_path):
    root = write_yolo(tmp_path / "images/data", source, contents)
    expected = boxes(splits(root).annotations("train"))
    (tmp_path / "elsewhere").mkdir()
    text("data.yaml", ("path: .", f"path: {root}"))(root)
    (root / "data.yaml").rename(tmp_path / "elsewhere/my.yaml")
    found = splits(tmp_path / "elsewhere")
    assert boxes(found.annotations("train")) == expected
    assert found.images("train").read(str(found.annotations("train").file_names[0])).shape[0] == 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ('<box label="star" xtl="1.5" ytl="2" xbr="11" ybr="22"/>', [1.5, 2, 9.5, 20]),
        ('<box label="star" xtl="10" ytl="20" xbr="30" ybr="60" rotation="90.0"/>', [0, 30, 40, 20]),
        ('<polygon label="star" points="5,6;15.5,7;8,30"/>', [5, 6, 10.5, 24]),
        ('<ellipse label="star" cx="50" cy="40" rx="10" ry="20"/>', [40, 20, 20, 40]),
        ('<ellipse label="star" cx="50" cy="40" rx="10" ry="20" rotation="90"/>', [30, 30, 40, 20]),
        ('<mask label="star" rle="1, 2" left="4" top="5" width="6" height="7"/>', [4, 5, 6, 7]),
    ],
    ids=["box", "rotated box", "polygon", "ellipse", "rotated ellipse", "mask"],
)
def test_cvat_s_shapes_become_the_boxes_around_them(tmp_path, shape, expected, caplog):
    image = {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}
    xml = cvat_xml({"default": {"images": [image], "annotations": []}})
    others = '<tag label="star"/><points label="star" points="1,2"/><polyline label="star" points="1,2;3,4"/>'
    (tmp_path / "annotations.xml").write_text(xml.replace("</image>", f"{shape}\n{others}</image>"))
    assert np.allclose(boxes(splits(tmp_path).annotations("train")), [expected], rtol=0, atol=1e-12)
    assert "2 shapes without a box, ignored (line 7: points, line 7: polyline)" in caplog.text


def test_voc_without_sizes_and_with_fractions_of_pixels(source, contents, tmp_path, caplog):
    root = write_voc(tmp_path, source, {"train": contents["train"]}, "kangaroo")
    name = "annots/000001.xml"
    text(name, ("<width>269", "<width>0"), ("<xmin>82<", "<xmin>45.7<"), ("<xmin>102<", "<xmin>0<"))(root)
    (root / "images/other.png").write_bytes(b"")
    found = splits(root).annotations("train")
    assert (found.heights[0], found.widths[0]) == (190, 269)
    assert found.xywh[:2].tolist() == [[44.7, 38, 241 - 45.7 + 1, 129], [-1, 0, 241, 114]]
    assert "1 image without an XML file, ignored (other.png)" in caplog.text
    assert f"1 box from pixel 0, although VOC counts pixels from 1 ({name} line 14)" in caplog.text


def test_a_single_coco_json_is_of_the_training_split_and_its_images_may_be_zipped(source, contents, tmp_path):
    (tmp_path / "annotations").mkdir()
    shutil.copy(source / TWIN["train_json"], tmp_path / "annotations/labels.json")
    (tmp_path / "annotations/other.json").write_text("[]")
    shutil.make_archive(str(tmp_path / "train"), "zip", source / "train")
    found = splits(tmp_path, val_fraction=0.25)
    assert (len(found.annotations("train")), len(found.annotations("val"))) == (9, 3)
    assert found.images("val").path == tmp_path / "train.zip"


def test_a_format_can_be_chosen_where_there_are_several(source, contents, tmp_path):
    write_voc(tmp_path, source, contents)
    write_cvat(tmp_path, source, contents)
    assert find_layout(tmp_path, "voc").evidence == "Annotations/*.xml"
    assert len(splits(tmp_path, format="cvat").annotations("val")) == 5
    with pytest.raises(UserError, match=r"format=yolo: no data\.yaml with images/ and labels/ in .*Annotations/"):
        splits(tmp_path, format="yolo").annotations("val")


def test_a_split_that_is_missing_is_named_with_what_to_do(source, contents, tmp_path):
    train = {"train": contents["train"]}
    root = write_voc(tmp_path / "voc", source, train)
    with pytest.raises(UserError, match=r"has no val split in voc format .*hold out .* with val_fraction=0\.2"):
        splits(root).annotations("val")
    root = write_yolo(tmp_path / "yolo", source, train)
    (root / "data.yaml").write_text(f"val: images/val\n{(root / 'data.yaml').read_text()}")
    with pytest.raises(UserError, match=r"data\.yaml: val names images/val, but there is no "):
        splits(root).annotations("val")
    assert len(splits(root, val_fraction=0.25).annotations("val")) == 3
    with pytest.raises(UserError, match=r"^root=.*/none: no such folder"):
        splits(tmp_path / "none").annotations("val")
