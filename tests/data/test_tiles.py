"""Tiles: where they are, which objects they have, and the training batches made of them."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.data import CocoAnnotations, CocoDataModule
from cpm_rcnn.data.mixing import Mosaic
from cpm_rcnn.data.shapes import write_shapes
from cpm_rcnn.data.tiles import MIN_INSIDE, Tiles, tile_grid
from cpm_rcnn.errors import ArgumentError

SIDES = st.integers(1, 700)
TILES = st.integers(64, 300)
OVERLAPS = st.floats(0, 0.89)


@settings(deadline=None)
@given(SIDES, SIDES, TILES, OVERLAPS)
def test_tiles_have_one_size_cover_the_image_and_overlap_enough(height, width, tile, overlap):
    grid = tile_grid(height, width, tile, overlap)
    covered = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in grid.tolist():
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (bottom - top, right - left) == (min(tile, height), min(tile, width))
        covered[top:bottom, left:right] = True
    assert covered.all()
    for axis, side in ((0, width), (1, height)):
        starts = np.unique(grid[:, axis])
        assert (np.diff(starts) <= tile - round(tile * overlap)).all()
        # One tile less would not be enough.
        assert (len(starts) - 2) * (tile - round(tile * overlap)) < max(side - tile, 1)
    assert len(grid) == len(np.unique(grid, axis=0))


@settings(deadline=None)
@given(st.integers(100, 700), TILES, OVERLAPS, st.data())
def test_an_object_no_larger_than_the_overlap_is_whole_in_a_tile(side, tile, overlap, data):
    grid = tile_grid(side, side, tile, overlap)
    width, height = (data.draw(st.integers(0, min(round(tile * overlap), side))) for _ in range(2))
    x, y = data.draw(st.integers(0, side - width)), data.draw(st.integers(0, side - height))
    left, top, right, bottom = grid.T
    assert ((left <= x) & (top <= y) & (x + width <= right) & (y + height <= bottom)).any()


def annotations_of(path, sizes, boxes, **extra):
    """Annotations of images with some sizes (height, width); of each box (image, x, y, width, height)."""
    content = {
        "images": [
            {"id": 10 + row, "file_name": f"{row}.png", "height": height, "width": width}
            for row, (height, width) in enumerate(sizes)
        ],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": row, "image_id": 10 + image, "category_id": 1, "bbox": list(box), **extra}
            for row, (image, *box) in enumerate(boxes)
        ],
    }
    path.write_text(json.dumps(content))
    return CocoAnnotations.load(path)


@settings(deadline=None, max_examples=50)
@given(TILES, OVERLAPS, st.integers(0, 2**32 - 1))
def test_the_objects_of_tiles_are_those_of_a_comparison_one_by_one(tmp_path_factory, tile, overlap, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(30, 500, (4, 2)).tolist()
    boxes = []
    for _ in range(30):
        image = int(rng.integers(4))
        height, width = sizes[image]
        corner, sides = rng.uniform(-20, (width - 1, height - 1)), rng.uniform(21, 200, 2)
        boxes.append((image, *corner.round(1).tolist(), *sides.round(1).tolist()))
    whole = annotations_of(tmp_path_factory.mktemp("json") / "a.json", sizes, boxes)
    tiles = Tiles.of(whole, tile, overlap, min_box_size=2.0)

    expected = []
    for row, (height, width) in enumerate(sizes):
        for left, top, right, bottom in tile_grid(height, width, tile, overlap).tolist():
            objects = []
            for k in range(whole.offsets[row], whole.offsets[row + 1]):
                x, y, w, h = whole.xywh[k].tolist()
                inside_x, inside_y = min(x + w, right) - max(x, left), min(y + h, bottom) - max(y, top)
                if inside_x <= 0 or inside_y <= 0:
                    continue
                area = (min(x + w, width) - max(x, 0)) * (min(y + h, height) - max(y, 0))
                usable = inside_x * inside_y >= MIN_INSIDE * area and min(inside_x, inside_y) > 2
                objects.append((x - left, y - top, w, h, bool(usable)))
            expected.append(((row, bottom - top, right - left), objects))
    found = []
    each = tiles.annotations
    for t in range(len(each)):
        objects = slice(each.offsets[t], each.offsets[t + 1])
        boxes_of = [(*box, usable) for box, usable in zip(each.xywh[objects].tolist(), each.usable[objects].tolist())]
        found.append(((int(tiles.images[t]), int(each.heights[t]), int(each.widths[t])), boxes_of))
    assert found == expected


@pytest.mark.parametrize("overlap", [0.0, 0.3])
def test_each_object_no_larger_than_a_tile_is_used_in_a_tile(tmp_path, overlap):
    rng = np.random.default_rng(0)
    boxes = [(0, *(rng.uniform(0, 400 - side)), *side) for side in rng.uniform(1, 100, (500, 2))]
    whole = annotations_of(tmp_path / "a.json", [(400, 400)], boxes)
    tiles = Tiles.of(whole, 100, overlap).annotations
    assert set(tiles.numbers[tiles.usable]) == set(range(500))


def test_an_object_of_which_less_than_a_quarter_is_in_a_tile_is_not_used_there_and_neither_are_crowds(tmp_path):
    # Tiles 0..100 and 100..200.
    boxes = [(0, 77, 10, 30, 30), (0, 78, 50, 30, 30)]
    whole = annotations_of(tmp_path / "a.json", [(100, 200)], boxes)
    left, right = (Tiles.of(whole, 100, 0.0).annotations.select(np.array([t])) for t in range(2))
    assert left.xywh.tolist() == [[77, 10, 30, 30], [78, 50, 30, 30]]
    assert right.xywh.tolist() == [[-23, 10, 30, 30], [-22, 50, 30, 30]]
    tiles = Tiles.of(whole, 100, 0.0).annotations
    assert tiles.usable.tolist() == [True, True, False, True]
    crowds = annotations_of(tmp_path / "b.json", [(100, 200)], boxes, iscrowd=1)
    assert not Tiles.of(crowds, 100, 0.0).annotations.usable.any()
    # A tile with a small part of an object is no image without objects.
    assert len(tiles.images_without_objects()) == 0


OPTIONS = {
    "train_json": "annotations/instances_train.json",
    "train_images": "train",
    "val_json": "annotations/instances_val.json",
    "val_images": "val",
    "num_workers": 0,
    "short_sides": [64, 80],
    "max_size": 120,
    "test_short_side": 64,
    "test_max_size": 120,
    "batch_size": 3,
    "max_steps": 8,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, 8, 3)
    return root


@pytest.fixture
def module(root):
    return lambda **changes: CocoDataModule(**{"root": str(root), **OPTIONS, **changes})


def same(batches, others):
    """Whether two lists of batches are equal to the last bit."""
    pairs = list(zip(batches, others, strict=True))
    images = all(torch.equal(*pair) for batch in pairs for pair in zip(batch[0][0], batch[1][0], strict=True))
    targets = [pair for batch in pairs for pair in zip(batch[0][1], batch[1][1], strict=True)]
    return images and all(
        a["image_id"] == b["image_id"] and all(torch.equal(a[name], b[name]) for name in ("boxes", "labels"))
        for a, b in targets
    )


@pytest.mark.parametrize("options", [{"augment": "strong"}, {"negatives": 0.3, "min_box_size": 14.0}])
def test_tiles_as_large_as_the_images_give_the_batches_of_whole_images(module, root, tmp_path, options):
    content = json.loads((root / OPTIONS["train_json"]).read_text())
    empty = content["images"][0]["id"]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != empty]
    (tmp_path / "a.json").write_text(json.dumps(content))
    options = options | {"train_json": str(tmp_path / "a.json")}
    tiled = list(module(tile=300, **options).train_dataloader())
    assert same(tiled, list(module(**options).train_dataloader()))


def test_a_tile_has_the_pixels_and_objects_of_its_part_of_the_image(module, root):
    data = module(tile=128, short_sides=[128], max_size=128, flip_probability=0.0)
    whole, images = data.annotations("train"), data.splits.images("train")
    dataset = data.train_dataloader().dataset
    assert len(dataset) == sum(len(tile_grid(*size, 128, 0.2)) for size in zip(whole.heights, whole.widths))
    checked = 0
    for row in data.train_dataloader().batch_sampler.order.global_batch(0):
        tile, target = dataset[row]
        image_row = int(dataset.tiles.images[row.image])
        left, top, right, bottom = dataset.tiles.boxes[row.image].tolist()
        assert tile.shape == (3, 128, 128)
        assert torch.equal(tile, images.read(str(whole.file_names[image_row]))[:, top:bottom, left:right])
        objects = slice(whole.offsets[image_row], whole.offsets[image_row + 1])
        boxes = CONTINUOUS.from_xywh(torch.from_numpy(whole.xywh[objects]).float())
        shifted = CONTINUOUS.clip(boxes - torch.tensor([left, top, left, top]), torch.tensor([128, 128]))
        assert all((box == shifted).all(dim=1).any() for box in target["boxes"])
        checked += len(target["boxes"])
    assert checked >= 3
    assert data.num_training_images == len(dataset.annotations.images_with_objects()) > len(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_of_tiles_do_not_depend_on_the_number_of_workers(module, workers):
    options = {"tile": 96, "augment": "strong", "negatives": 0.2, "max_steps": 4}
    batches = list(module(**options, num_workers=workers).train_dataloader())
    assert same(batches, list(module(**options).train_dataloader()))


def test_a_run_that_resumes_gets_the_tiles_of_the_remaining_steps(module):
    options = {"tile": 96, "augment": "standard", "negatives": 0.2}
    resumed = module(**options)
    resumed.start_step = 5
    assert same(list(resumed.train_dataloader()), list(module(**options).train_dataloader())[5:])


def test_validation_batches_are_whole_images_of_their_original_size(module):
    data = module(tile=96)
    for images, targets in data.val_dataloader():
        assert [tuple(image.shape[1:]) for image in images] == [target["original_size"] for target in targets]
    assert len(data.val_dataloader().dataset) == 3


def test_a_tile_of_an_unreadable_image_is_replaced_by_one_of_another_image_and_reported_once(
    module, root, tmp_path, caplog
):
    content = json.loads((root / OPTIONS["train_json"]).read_text())
    broken = content["images"][0]
    (tmp_path / "images").mkdir()
    for image in content["images"]:
        source = (root / "train" / image["file_name"]).read_bytes()
        (tmp_path / "images" / image["file_name"]).write_bytes(source if image is not broken else source[:100])
    data = module(tile=96, on_error="skip", train_images=str(tmp_path / "images"))
    dataset = data.train_dataloader().dataset
    rows = np.flatnonzero(dataset.tiles.images == 0)
    ids = [dataset[int(row)][1]["image_id"] for row in rows]
    assert len(ids) > 1
    assert broken["id"] not in ids
    assert sum("replaced by another image" in message for message in caplog.messages) == 1


def test_a_mosaic_of_tiles_takes_tiles(module):
    data = module(tile=96)
    data.train_augmentations = [Mosaic(1.0, data.convention)]
    images, targets = next(iter(data.train_dataloader()))
    assert {tuple(image.shape) for image in images} == {(3, 96, 96)}
    assert all(target["boxes"].max() <= 96 for target in targets)


def test_negatives_are_tiles_without_objects(tmp_path, module):
    annotations = annotations_of(tmp_path / "a.json", [(100, 300)], [(0, 10, 10, 20, 20)])
    Image.new("RGB", (300, 100)).save(tmp_path / "0.png")
    files = {"train_json": str(annotations.path), "train_images": str(tmp_path)}
    data = module(**files, tile=100, tile_overlap=0.0, negatives=0.5, max_steps=4)
    counts = [len(target["boxes"]) for _, targets in data.train_dataloader() for target in targets]
    assert sorted(counts) == [0] * 6 + [1] * 6
    with pytest.raises(ArgumentError, match=r"negatives=0.5: .*a.json has no tile without objects"):
        module(**files, tile=400, negatives=0.5).train_dataloader()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("tile", 63, "=63: must be an integer, at least 64"),
        ("tile", 100.5, "=100.5: must be an integer"),
        ("tile", "large", "=large: must be an integer"),
        ("tile_overlap", 0.9, "=0.9: must be below 0.9"),
        ("tile_overlap", -0.1, "=-0.1: must be a number, 0 to 0.9"),
        ("tile_overlap", None, "=null: must be a number"),
    ],
)
def test_invalid_tiles_are_refused(module, name, value, allowed):
    with pytest.raises(ArgumentError) as caught:
        module(**{name: value})
    assert str(caught.value).startswith(name + allowed)
