"""Detection in tiles: one detection per object, in pixels of the whole image."""

import pytest
import torch
from torch import nn
from torchvision.ops import nms

from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS
from cpm_rcnn.data.tiles import tile_grid
from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.inference import Detector, MultiScaleSettings
from cpm_rcnn.inference.tiles import TiledDetector
from cpm_rcnn.models.build import build_detector
from small_models import CATEGORIES, SMALL


class _Objects:
    """Finds rectangles, each painted in a color of its own, whose label is that color modulo 4.

    The score is 0.5 plus the part of the rectangle of the color's number that is visible, times 0.4: the larger part of
    an object has the better score, unless ``parts_first``.
    """

    def __init__(self, convention=CONTINUOUS, parts_first=False):
        self.convention = convention
        self.parts_first = parts_first
        self.calls = []

    def __call__(self, images):
        self.calls.append([tuple(image.shape[1:]) for image in images])
        return [self._find(image[0]) for image in images]

    def _find(self, image):
        boxes, labels, scores = [], [], []
        for color in image.unique().tolist():
            if not color:
                continue
            y, x = (image == color).nonzero(as_tuple=True)
            end = 1 - self.convention.extra
            boxes.append([x.min(), y.min(), x.max() + end, y.max() + end])
            labels.append(color % 4 + 1)
            seen = min(len(x) / 1e5, 1)
            scores.append(0.5 + 0.4 * (1 - seen if self.parts_first else seen))
        order = torch.tensor(scores).argsort(descending=True)
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)[order],
            "scores": torch.tensor(scores)[order],
            "labels": torch.tensor(labels, dtype=torch.int64)[order],
            "class_scores": torch.tensor(scores)[order] / 2,
        }


def _image(height, width, *rectangles):
    """A black image with rectangles (color, x1, y1, x2, y2)."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for color, x1, y1, x2, y2 in rectangles:
        image[:, y1:y2, x1:x2] = color
    return image


def _tiled(detector, convention=CONTINUOUS, tile=100, overlap=0.3, batch_size=2, max_detections=None):
    return TiledDetector(detector, tile, overlap, convention, batch_size, max_detections)


def _sorted(found):
    order = found["boxes"].sum(dim=1).argsort()
    return {name: column[order] for name, column in found.items()}


# The tiles begin at 0, 50, 100 and so on: tile_grid(200, 300, 100, 0.3).
SEAMS = {
    "in one tile": (10, 10, 30, 40),
    "across an edge": (85, 20, 113, 45),
    "mostly beyond an edge": (95, 120, 125, 140),
    "across a corner": (90, 90, 115, 112),
    "at the border of the image": (280, 180, 300, 200),
    "as large as the overlap": (90, 60, 120, 90),
}


@pytest.mark.parametrize("parts_first", [False, True], ids=["whole objects score best", "parts score best"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_an_object_in_several_tiles_is_found_once_as_in_the_whole_image(name, parts_first):
    image = _image(200, 300, *((color, *box) for color, box in enumerate(SEAMS.values(), start=1)))
    detector = _Objects(CONVENTIONS[name], parts_first)
    (expected,) = map(_sorted, detector([image]))
    (found,) = map(_sorted, _tiled(detector, CONVENTIONS[name])([image]))
    assert torch.equal(found["boxes"], expected["boxes"])
    assert torch.equal(found["labels"], expected["labels"])
    assert torch.equal(found["class_scores"], found["scores"] / 2)


def test_detections_are_sorted_by_score_and_only_the_best_are_kept():
    image = _image(200, 300, (1, 10, 10, 20, 20), (2, 110, 10, 140, 40), (3, 210, 110, 270, 170))
    (found,) = _tiled(_Objects(), max_detections=2)([image])
    assert found["labels"].tolist() == [4, 3]
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def _fixed(grid, *detections):
    """A detector of an image with tiles ``grid``: detections (tile, label, score, box in the image)."""
    answers = []
    for t, (left, top, _, _) in enumerate(grid):
        own = [(label, score, box) for tile, label, score, box in detections if tile == t]
        answers.append(
            {
                "boxes": torch.tensor([box for *_, box in own], dtype=torch.float32).reshape(-1, 4)
                - torch.tensor([left, top, left, top]),
                "scores": torch.tensor([score for _, score, _ in own]),
                "labels": torch.tensor([label for label, *_ in own], dtype=torch.int64),
            }
        )
    remaining = iter(answers)
    return lambda tiles: [next(remaining) for _ in tiles]


PART, WHOLE = [155, 20, 200, 40], [152, 20, 240, 41]


@pytest.mark.parametrize(
    ("part", "other", "remaining"),
    [
        ((0, 1, 0.9, PART), (1, 1, 0.6, WHOLE), [WHOLE]),
        ((0, 1, 0.9, [150, 20, 196, 40]), (1, 1, 0.6, WHOLE), [WHOLE]),  # ends near the edge
        ((0, 1, 0.9, [150, 20, 204, 40]), (1, 1, 0.6, WHOLE), [WHOLE]),  # ends beyond the edge
        ((0, 1, 0.9, [150, 20, 190, 40]), (1, 1, 0.6, WHOLE), [[150, 20, 190, 40], WHOLE]),  # is not cut
        ((0, 1, 0.9, PART), (1, 2, 0.6, WHOLE), [PART, WHOLE]),  # is of another class
        ((0, 1, 0.9, PART), (1, 1, 0.4, WHOLE), [PART, WHOLE]),  # scores less than half
        ((0, 1, 0.9, PART), (1, 1, 0.8, [180, 20, 300, 40]), [PART, [180, 20, 300, 40]]),  # covers less than half
        ((0, 1, 0.9, PART), (0, 1, 0.8, [100, 20, 200, 45]), [PART, [100, 20, 200, 45]]),  # is in the same tile
        ((0, 1, 0.9, [0, 20, 40, 40]), (1, 1, 0.8, [0, 20, 90, 40]), [[0, 20, 40, 40], [0, 20, 90, 40]]),
    ],
)  # fmt: skip
def test_a_part_is_dropped_for_a_larger_detection_that_covers_it_in_another_tile(part, other, remaining):
    grid = [[0, 0, 200, 100], [100, 0, 300, 100]]
    assert tile_grid(100, 300, 200, 0.4).tolist() == grid
    (found,) = _tiled(_fixed(grid, part, other), tile=200, overlap=0.4)([_image(100, 300)])
    assert found["boxes"].tolist() == remaining


def test_detections_of_one_class_are_those_of_nms_unless_they_are_cut():
    generator = torch.Generator().manual_seed(0)
    grid = tile_grid(400, 400, 200, 0.25).tolist()
    detections = []
    for t, (left, top, _, _) in enumerate(grid):
        for score in torch.rand(30, generator=generator).tolist():
            x, y, w, h = (torch.rand(4, generator=generator) * torch.tensor([80.0, 80, 50, 50]) + 30).tolist()
            detections.append((t, 1, score, [left + x, top + y, left + x + w, top + y + h]))
    (found,) = _tiled(_fixed(grid, *detections), tile=200, overlap=0.25, batch_size=4)([_image(400, 400)])
    boxes = torch.tensor([box for *_, box in detections])
    scores = torch.tensor([score for _, _, score, _ in detections])
    rows = nms(boxes, scores, 0.5)
    assert 10 < len(rows) < len(boxes)
    torch.testing.assert_close(found["boxes"], boxes[rows])


def test_tiles_of_all_images_go_through_the_detector_in_batches():
    detector = _Objects()
    found = _tiled(detector, batch_size=4)([_image(100, 170), _image(60, 80), _image(200, 100)])
    assert [len(each["scores"]) for each in found] == [0, 0, 0]
    assert detector.calls == [[(100, 100), (100, 100), (60, 80), (100, 100)], [(100, 100), (100, 100)]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_detector(num_classes=2, **SMALL).eval()
    nn.init.normal_(model.head.classifier.predictor.weight, std=1.0)
    nn.init.constant_(model.head.ism.predictor.bias, 0.5)
    return model


SIZES = {"short_side": 64, "max_size": 96}


def random_image(height, width):
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("multi_scale", [None, MultiScaleSettings(scales=[0.5, 1.0])])
def test_an_image_no_larger_than_a_tile_has_the_detections_of_no_tiles(model, multi_scale):
    images = [random_image(90, 120), random_image(120, 70)]
    whole = Detector(model, CATEGORIES, multi_scale=multi_scale, **SIZES)
    tiled = Detector(model, CATEGORIES, multi_scale=multi_scale, tile=120, **SIZES)
    for one, two in zip(tiled.detect(images, details=True), whole.detect(images, details=True), strict=True):
        assert len(one)
        assert one.names == two.names
        assert one.to_dict().keys() == two.to_dict().keys()
        assert all(torch.equal(column, two.to_dict()[name]) for name, column in one.to_dict().items())


@pytest.mark.parametrize("multi_scale", [None, MultiScaleSettings(scales=[0.5, 1.0])])
def test_the_detections_of_a_large_image_are_those_of_its_tiles(model, multi_scale):
    image = random_image(100, 250)
    whole = Detector(model, CATEGORIES, multi_scale=multi_scale, **SIZES)
    tiled = Detector(model, CATEGORIES, multi_scale=multi_scale, tile=100, tile_overlap=0.0, **SIZES)
    (found,) = tiled.detect(image)
    tiles = tile_grid(100, 250, 100, 0.0).tolist()
    parts = whole.detect([image[:, y1:y2, x1:x2] for x1, y1, x2, y2 in tiles])
    boxes = torch.cat([part.boxes + torch.tensor([x, y, x, y]) for part, (x, y, _, _) in zip(parts, tiles)])
    known = {(tuple(box), score) for box, score in zip(boxes.tolist(), torch.cat([p.scores for p in parts]).tolist())}
    assert {(tuple(box), score) for box, score in zip(found.boxes.tolist(), found.scores.tolist())} <= known
    assert 0 < len(found) <= len(known)
    assert found.boxes[:, 2].max() > 150


def test_the_maximum_number_of_detections_is_per_image():
    torch.manual_seed(0)
    model = build_detector(num_classes=2, **SMALL, max_detections=3).eval()
    (found,) = Detector(model, CATEGORIES, tile=100, **SIZES).detect(random_image(100, 250))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "^tile=0: must be an integer, at least 64"),
        ({"tile": 100, "tile_overlap": 1.0}, "^tile_overlap=1.0: must be a number, 0 to 0.9"),
        ({"tile_overlap": 0.9}, "^tile_overlap=0.9: must be below 0.9"),
    ],
)
def test_invalid_tiles_are_refused(model, options, message):
    with pytest.raises(ArgumentError, match=message):
        Detector(model, CATEGORIES, **SIZES, **options)
