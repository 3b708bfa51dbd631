"""The outputs of ``predict``."""

import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.data.source_reader import SourceImage
from cpm_rcnn.data.sources import SourceFile
from cpm_rcnn.data.video import Frame
from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import ImageDetections
from cpm_rcnn.reporting import predictions
from cpm_rcnn.reporting.predictions import OUTPUTS, Crops, Csv, OutputOptions, Pictures, Yolo


def frame(video, number, side):
    """A frame with one object, and its detection."""
    image = torch.full((3, 1000, 2000), 90, dtype=torch.uint8)
    found = ImageDetections(
        boxes=torch.tensor([[100.0, 100, 100 + side, 100 + side]]),
        scores=torch.tensor([0.9]),
        labels=torch.tensor([1]),
        names=["cat"],
        category_ids=[1],
        convention=CONTINUOUS,
    )
    place = Frame(video, number, number, Fraction(1, 25), Fraction(25))
    return SourceImage(number + 1, f"{video}/{number:06d}", image, place), found


def test_the_text_of_a_video_keeps_its_size_unless_objects_get_smaller(tmp_path, monkeypatch):
    sizes, draw = [], predictions.draw
    monkeypatch.setattr(predictions, "draw", lambda *args, size, **more: sizes.append(size) or draw(*args, **more))
    pictures = Pictures(OutputOptions(tmp_path, ["cat"], [0.3], []))
    for video, sides in (("a.mp4", (180, 600, 120, 180)), ("b.mp4", (600,))):
        for number, side in enumerate(sides):
            pictures.add(*frame(video, number, side))
    pictures.close()
    assert sizes == [30, 30, 20, 20, 38]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["a.mp4.mp4", "b.mp4.mp4"]


def image_file(name):
    return SourceFile(name, name, Path(name), bytes)


def test_two_images_with_one_file_of_labels_are_refused_before_any_detection(tmp_path):
    files = [image_file(name) for name in ("a.jpg", "a.mp4", "x/a.png", "a.png")]
    with pytest.raises(UserError, match=r"a\.jpg and a\.png would have the same file of labels: rename one"):
        Yolo(OutputOptions(tmp_path, ["cat"], [0.3], files))
    Yolo(OutputOptions(tmp_path, ["cat"], [0.3], files[:3]))


def test_crops_of_classes_with_similar_names_do_not_replace_each_other_or_leave_the_folder(tmp_path):
    classes = ["a/b", "a_b", ".."]
    found = ImageDetections(
        boxes=torch.tensor([[0.0, 0, 4, 4]]).repeat(3, 1),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        labels=torch.tensor([1, 2, 3]),
        names=classes,
        category_ids=[1, 2, 3],
        convention=CONTINUOUS,
    )
    crops = Crops(OutputOptions(tmp_path, classes, [0.3] * 3, [image_file("a.jpg")]))
    crops.add(SourceImage(1, "a.jpg", torch.zeros(3, 8, 8, dtype=torch.uint8)), found)
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert paths == ["crops/_../a.jpg_1.png", "crops/a_b/a.jpg_1.png", "crops/a_b/a.jpg_2.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize(("kind", "name"), [("coco", "detections.json"), ("csv", "detections.csv")])
def test_a_table_that_cannot_be_written_is_named(tmp_path, kind, name):
    (tmp_path / name).symlink_to("/dev/full")
    output = OUTPUTS[kind](OutputOptions(tmp_path, ["cat"], [0.3], []))
    output.add(*frame("a.mp4", 0, 100))
    with pytest.raises(UserError, match=rf"{name}: cannot be written \(No space left on device\)"):
        output.close()


def test_a_table_has_the_bytes_of_a_name_that_is_not_utf_8(tmp_path):
    table = Csv(OutputOptions(tmp_path, ["cat"], [0.3], []))
    image, found = frame(os.fsdecode(b"\xff.mp4"), 0, 100)
    table.add(image, found)
    table.close()
    assert b"\n\xff.mp4/000000,cat," in (tmp_path / "detections.csv").read_bytes()
