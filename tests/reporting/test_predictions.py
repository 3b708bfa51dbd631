"""Annotated videos among the outputs of ``predict``."""

from fractions import Fraction

import torch

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.data.source_reader import SourceImage
from cpm_rcnn.data.video import Frame
from cpm_rcnn.inference import ImageDetections
from cpm_rcnn.reporting import predictions
from cpm_rcnn.reporting.predictions import OutputOptions, Pictures


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
    pictures = Pictures(OutputOptions(tmp_path, ["cat"], [0.3], has_videos=True))
    for video, sides in (("a.mp4", (180, 600, 120, 180)), ("b.mp4", (600,))):
        for number, side in enumerate(sides):
            pictures.add(*frame(video, number, side))
    pictures.close()
    assert sizes == [30, 30, 20, 20, 38]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["a.mp4.mp4", "b.mp4.mp4"]
