"""The checks of a data set: each planted fault is found with file and id, and nothing in clean data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cpm_rcnn.boxes import CONTINUOUS, INCLUSIVE
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.doctor.anchors import Anchors, suggested_sizes
from cpm_rcnn.data.doctor.checked_split import CheckedSplit
from cpm_rcnn.data.doctor.classes import class_findings
from cpm_rcnn.data.doctor.examination import Examination, examine, examine_annotations
from cpm_rcnn.data.doctor.objects import SAME_IOU, repeated_boxes
from cpm_rcnn.data.settings import DataSettings
from cpm_rcnn.data.splits import DataSplits
from cpm_rcnn.data.transforms import network_size
from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.fpn import STRIDES
from cpm_rcnn.models.rpn import RATIOS, RegionProposalNetwork, RPNSettings, level_anchors
from cpm_rcnn.models.structures import GroundTruth
from dataset_folders import shapes, write_yolo
from faulty_data import TRAIN, VAL, plant_faults, write_clean

SIZES = {"short_sides": (192,), "max_size": 256, "test_short_side": 192, "test_max_size": 256}
ANCHORS = Anchors((16, 32, 64, 128, 256), STRIDES, RATIOS, CONTINUOUS, ignore_border=False)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_clean(tmp_path_factory.mktemp("clean") / "shapes")


@pytest.fixture
def copied(clean, tmp_path):
    """A copy of the clean shapes, which a test may change."""
    return shutil.copytree(clean, tmp_path / "shapes")


def examined(root: Path, anchors: Anchors = ANCHORS, **options) -> Examination:
    settings = DataSettings(root=str(root), **SIZES, **options)
    return examine(DataSplits(settings), settings, anchors)


def kinds(examination: Examination) -> list[str]:
    return [finding.kind for finding in examination.findings]


@pytest.fixture(scope="module")
def planted(clean, tmp_path_factory):
    """The faults that must be found, and the examination."""
    root = shutil.copytree(clean, tmp_path_factory.mktemp("planted") / "shapes")
    expected = plant_faults(root)
    return expected, examined(root)


def test_nothing_is_reported_on_clean_shapes(clean):
    examination = examined(clean)
    assert examination.findings == []
    assert [split["images"] for split in examination.splits] == [60, 30]
    assert sum(each["objects"]["train"] for each in examination.classes) == examination.splits[0]["objects"] > 100


def test_each_planted_fault_is_found_with_its_file_and_id(planted):
    expected, examination = planted
    assert len(expected) >= 20
    found = [
        (
            finding.severity,
            finding.kind,
            f"{example.split}/{example.file}" if example.size else example.file,
            example.id,
            f"{finding.sentence} {example.detail} {example.id}",
        )
        for finding in examination.findings
        for example in finding.examples
    ]
    for severity, kind, place, name, text in expected:
        matching = [each for each in found if each[:3] == (severity, kind, place) and each[3].startswith(name)]
        assert any(text in each[4] for each in matching), (severity, kind, place, name, text)


def test_nothing_but_the_planted_faults_is_found(planted):
    expected, examination = planted
    assert set(kinds(examination)) == {kind for _, kind, *_ in expected}
    # Each fault of the json is a finding; the four unreadable images are one.
    distinct = {
        (severity, kind, text if kind == "invalid annotations" else "") for severity, kind, _, _, text in expected
    }
    assert len(examination.findings) == len(distinct)


def test_the_most_severe_findings_come_first(planted):
    severities = [finding.severity for finding in planted[1].findings]
    assert severities == sorted(severities, key=["fault", "warning", "note"].index)


def test_the_root_class_comes_with_the_selection_of_all_others(planted):
    (root,) = (finding for finding in planted[1].findings if finding.kind == "root class")
    assert root.override == "classes=[circle,square,triangle,star,cross,hexagon,heart,moon]"


def test_objects_of_formats_without_ids_are_named_by_line(tmp_path):
    contents = shapes(tmp_path / "source", 60, 30)
    write_yolo(tmp_path / "yolo", tmp_path / "source", contents)
    label = next(
        path for path in sorted((tmp_path / "yolo/labels/train").iterdir()) if path.read_text().count("\n") > 1
    )
    lines = label.read_text().splitlines()
    label.write_text("\n".join([*lines, lines[0]]))
    # Images without a label file are unusual, too.
    examination = examined(tmp_path / "yolo")
    assert kinds(examination) == ["unusual annotations"] * 2 + ["duplicate boxes"]
    finding = examination.findings[-1]
    assert str(finding.examples[0]) == f"train/images/train/{label.stem}.jpg line {len(lines) + 1} (as line 1)"


def test_a_split_that_cannot_be_read_is_a_fault_and_the_others_are_checked(copied):
    (copied / VAL).write_text("{")
    examination = examined(copied, train_json=TRAIN, train_images="train", val_json=VAL, val_images="val")
    assert kinds(examination) == ["unreadable annotations"]
    assert "not valid JSON" in examination.findings[0].sentence
    assert examination.findings[0].examples[0].file == str(copied / VAL)
    assert [split["name"] for split in examination.splits] == ["train"]


def test_unreadable_training_annotations_are_reported_once(copied):
    (copied / TRAIN).write_text("{")
    examination = examined(copied, train_json=TRAIN, train_images="train", val_json=VAL, val_images="val")
    assert [finding.kind for finding in examination.findings] == ["unreadable annotations"]
    assert examination.anchors is None


def test_a_missing_validation_split_is_a_warning_with_the_option_that_holds_one_out(copied):
    (copied / VAL).unlink()
    (finding,) = examined(copied).findings
    assert (finding.severity, finding.override) == ("warning", "val_fraction=0.2")
    assert examined(copied, val_fraction=0.2).findings == []


def test_paths_that_do_not_exist_are_errors_except_of_test_images(clean):
    options = {"train_json": TRAIN, "train_images": "train", "val_json": VAL, "val_images": "val"}
    with pytest.raises(ArgumentError, match="no such file"):
        examined(clean, **options | {"val_json": "nosuch.json"})
    (finding,) = examined(clean, **options, test_json="nosuch.json", test_images="test").findings
    assert (finding.severity, finding.kind) == ("note", "no test split")


@pytest.mark.filterwarnings("error")
def test_data_without_objects_and_readable_images_can_be_checked(copied):
    for split, path in (("train", TRAIN), ("val", VAL)):
        content = json.loads((copied / path).read_text())
        (copied / path).write_text(json.dumps(content | {"annotations": []}))
        for image in (copied / split).iterdir():
            image.write_bytes(b"")
    examination = examined(copied)
    assert set(kinds(examination)) == {"unreadable images", "class without objects", "images without objects"}
    assert [finding.count for finding in examination.findings[:2]] == [60, 30]


def annotations_of(boxes: np.ndarray, sizes: np.ndarray, images: np.ndarray, labels: np.ndarray) -> CocoAnnotations:
    """Images of ``sizes`` (I, 2) height and width, with xywh ``boxes`` (A, 4) sorted by image."""
    return CocoAnnotations(
        path=Path("a.json"),
        is_json=True,
        image_ids=np.arange(len(sizes)),
        file_names=np.array([f"{k}.jpg" for k in range(len(sizes))]),
        heights=sizes[:, 0],
        widths=sizes[:, 1],
        category_ids=[1, 2, 3],
        category_names=["a", "b", "c"],
        listed=np.ones(3, dtype=bool),
        has_annotations=True,
        offsets=np.searchsorted(images, np.arange(len(sizes) + 1)),
        labels=labels,
        xywh=boxes,
        areas=boxes[:, 2:].prod(axis=1),
        crowds=np.zeros(len(boxes), dtype=bool),
        usable=np.ones(len(boxes), dtype=bool),
        numbers=np.arange(len(boxes)),
        number_format="annotation {}",
    )


@pytest.fixture
def random_split():
    """60 random objects, some of them nearly equal, in images of different sizes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(120, 400, (8, 2))
    images, labels = np.sort(rng.integers(0, 8, 60)), rng.integers(1, 4, 60)
    limits = sizes[images][:, ::-1]
    wh = np.minimum(np.exp(rng.uniform(np.log(4), np.log(300), (60, 2))), limits)
    boxes = np.concatenate([rng.random((60, 2)) * (limits - wh), wh], axis=1)
    for row in range(0, 60, 4):
        other = row + 1 if row + 1 < 60 and images[row + 1] == images[row] else row
        boxes[other] = boxes[row] + rng.uniform(-0.02, 0.02, 4) * wh[row].min()
        labels[other] = labels[row]
    settings = DataSettings(short_sides=(150, 200, 250), max_size=260, resize_rounding="down")
    return CheckedSplit.of("train", annotations_of(boxes, sizes, images, labels), settings)


def test_sizes_are_those_of_the_network_at_the_median_length(random_split):
    annotations = random_split.annotations
    for size, height, width in zip(random_split.input_sizes.tolist(), annotations.heights, annotations.widths):
        assert tuple(size) == network_size((int(height), int(width)), 200, 260, "down")


def test_with_tiles_sizes_are_those_of_the_image_at_the_scale_of_its_tiles():
    boxes = np.array([[10.0, 20, 30, 60], [0, 0, 50, 50]])
    annotations = annotations_of(boxes, np.array([[400, 600], [90, 80]]), np.array([0, 1]), np.array([1, 1]))
    settings = DataSettings(test_short_side=200, test_max_size=200, tile=100)
    split = CheckedSplit.of("val", annotations, settings)
    assert split.input_sizes.tolist() == [[800, 1200], [200, 178]]
    assert split.input_boxes[0].tolist() == [20, 40, 80, 160]


def test_repeated_boxes_are_those_of_all_pairs(random_split):
    boxes, n = torch.from_numpy(random_split.boxes), len(random_split.boxes)
    iou = CONTINUOUS.iou(boxes[:, None], boxes).numpy()
    same = (random_split.labels == random_split.labels[:, None]) & (
        random_split.image_rows == random_split.image_rows[:, None]
    )
    expected = np.flatnonzero((np.tril(iou > SAME_IOU, -1) & same).any(axis=1))
    repeats, originals = repeated_boxes(random_split)
    assert 5 < len(expected) < n
    assert repeats.tolist() == expected.tolist()
    assert (iou[repeats, originals] > SAME_IOU).all()


@pytest.mark.parametrize("convention", [CONTINUOUS, INCLUSIVE], ids=lambda convention: convention.name)
def test_the_best_anchors_are_those_of_the_region_proposal_network(random_split, convention):
    settings = RPNSettings(anchor_sizes=ANCHORS.sizes, ignore_border_anchors=True)
    rpn = RegionProposalNetwork(settings, 8, STRIDES, convention)
    boxes, sizes = random_split.input_boxes, random_split.input_sizes[random_split.image_rows]
    best, inside = replace(ANCHORS, convention=convention).best_iou(boxes, sizes)
    ignored = (inside < 0.7) & (inside < best * (1 - 1e-5))
    compared = 0
    for row, (height, width) in enumerate(sizes.tolist()):
        padded = [-(-side // 32) * 32 for side in (height, width)]
        shapes = [[-(-side // stride) for side in padded] for stride in STRIDES]
        anchors = torch.cat(
            [
                level_anchors(convention, stride, size, shape, torch.device("cpu"))
                for stride, size, shape in zip(STRIDES, ANCHORS.sizes, shapes)
            ]
        )
        box = torch.from_numpy(boxes[row : row + 1].copy())
        box[:, 2:] -= convention.extra
        iou = convention.iou(box, anchors)
        assert iou.max().item() == pytest.approx(best[row], abs=1e-4)
        # Of anchors with the same IoU, rounding errors decide which one is the best there.
        size = torch.tensor([[height, width]])
        crossing = (convention.clip(anchors, size) != anchors).any(dim=1)[iou > iou.max() - 1e-5]
        if inside[row] < 0.7 and crossing.any() and not crossing.all():
            continue
        truth = GroundTruth.stack([{"boxes": box, "labels": torch.ones(1, dtype=torch.int64)}])
        labels, _ = rpn._assign(anchors, size, truth)
        assert (labels != 1).all() == ignored[row], row
        compared += 1
    assert compared > 40
    assert 3 < ignored.sum() < 57


def test_small_objects_get_smaller_anchors(random_split):
    annotations = replace(random_split.annotations, xywh=random_split.annotations.xywh * [1, 1, 0.1, 0.1])
    split = CheckedSplit("train", annotations, random_split.input_sizes)
    sizes, share = suggested_sizes(split, ANCHORS)
    best, _ = ANCHORS.best_iou(split.input_boxes, split.input_sizes[split.image_rows])
    assert sizes == sorted(set(sizes))
    assert sizes[0] < 16
    assert share < (best < 0.3).mean()
    findings = examine_annotations([split], ANCHORS)
    overrides = [finding.override for finding in findings if finding.kind == "anchor sizes"]
    assert overrides == [f"anchor_sizes=[{','.join(map(str, sizes))}]"]


def test_ignored_border_anchors_are_reported_only_if_they_are_ignored(clean):
    examination = examined(clean, replace(ANCHORS, ignore_border=True))
    (finding,) = examination.findings
    assert (finding.kind, finding.override) == ("border anchors", "ignore_border_anchors=false")
    share = finding.count / examination.splits[0]["objects"]
    assert examination.anchors["without_border_anchors"] == pytest.approx(share)
    assert examined(clean).anchors["without_border_anchors"] == pytest.approx(share)


def test_a_class_with_a_hundred_times_as_many_objects_is_noted(random_split):
    labels = np.where(np.arange(1010) < 1000, 1, 3)
    boxes, images = np.tile([5.0, 5.0, 20.0, 20.0], (1010, 1)), np.zeros(1010, dtype=np.int64)
    annotations = annotations_of(boxes, np.array([[100, 100]]), images, labels)
    found = class_findings([CheckedSplit("train", annotations, np.array([[100, 100]]))])
    assert [finding.kind for finding in found] == ["class without objects", "class balance"]
    assert "a has 100 times as many training objects as c" in found[1].sentence
