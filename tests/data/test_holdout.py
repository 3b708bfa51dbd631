"""The validation split of a data set that has none: similar images stay together, whatever the order of the files."""

import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.near_duplicates import FINGERPRINT_BITS, SIMILAR_BITS, fingerprints, group_similar
from cpm_rcnn.data.settings import DataSettings
from cpm_rcnn.data.shapes import render
from cpm_rcnn.data.splits import DataSplits
from cpm_rcnn.errors import ArgumentError, UserError

# Pictures whose background is not smooth; the fingerprints of smooth ones change with little noise.
NUMBERS = (0, 3, 4, 6, 8, 10, 11, 12, 14, 17, 18, 21, 22, 23, 7)


def picture(number):
    return Image.fromarray(render(np.random.default_rng([7, number]))[0])


def variants(image):
    """Copies that a person would call the same picture."""
    width, height = image.size
    moved = image.transform(image.size, Image.Transform.AFFINE, (1, 0, width / 100, 0, 1, 0))
    yield from (image.resize((width // 2, height // 2)), ImageEnhance.Brightness(image).enhance(1.3), moved)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """15 pictures, four of which have copies: ``a.jpg``, ``a_1.jpg``, ..."""
    root = tmp_path_factory.mktemp("pictures")
    for position, number in enumerate(NUMBERS):
        image, name = picture(number), f"{position:02d}"
        image.save(root / f"{name}.jpg", quality=90)
        for copy, variant in enumerate(variants(image) if position < 4 else ()):
            variant.save(root / f"{name}_{copy}.{'png' if copy == 1 else 'jpg'}")
    return root


@pytest.fixture(scope="module")
def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def held_out(folder, tmp_path):
    """The names of the validation images."""

    def held_out(names, fraction=0.3, images=folder, **settings):
        content = {"categories": [{"id": 1, "name": "thing"}], "images": [], "annotations": []}
        for number, name in enumerate(names, start=1):
            with Image.open(images / name) as image:
                width, height = image.size
            content["images"].append({"id": number, "file_name": name, "width": width, "height": height})
            content["annotations"].append({"id": number, "image_id": number, "category_id": 1, "bbox": [1, 2, 3, 4]})
        (tmp_path / "all.json").write_text(json.dumps(content))
        files = {"train_json": str(tmp_path / "all.json"), "train_images": str(images)}
        splits = DataSplits(DataSettings(**files, val_fraction=fraction, **settings))
        train, val = splits.annotations("train"), splits.annotations("val")
        assert sorted([*train.file_names, *val.file_names]) == sorted(names)
        assert splits.images("val") is splits.images("train")
        return set(val.file_names.tolist())

    return held_out


def test_copies_have_similar_fingerprints_and_other_pictures_have_not(folder, names):
    bits, problems = fingerprints(ImageSource(folder), names)
    assert bits.shape == (len(names), FINGERPRINT_BITS)
    assert problems == {}
    different = (bits[:, None] != bits).sum(axis=2)
    alike = np.array([[one[:2] == other[:2] for other in names] for one in names])
    assert different[alike].max() <= SIMILAR_BITS < different[~alike].min()


def test_16_bit_images_have_the_fingerprints_of_8_bit_ones(tmp_path):
    gray = np.asarray(picture(0).convert("L"))
    Image.fromarray(gray).save(tmp_path / "8.png")
    Image.fromarray(gray.astype(np.uint16) * 256).save(tmp_path / "16.png")
    bits, _ = fingerprints(ImageSource(tmp_path), ["8.png", "16.png"])
    assert bits[0].any()
    assert np.array_equal(*bits)


def test_groups_are_chains_of_similar_fingerprints():
    bits = np.zeros((6, 40), dtype=bool)
    for row, count in enumerate((0, 20, 4, 8, 24, 40)):
        bits[row, :count] = True
    assert group_similar(bits, 4).tolist() == [0, 1, 0, 0, 1, 5]
    assert group_similar(bits, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert group_similar(bits[[0, 0, 1]], 0).tolist() == [0, 0, 2]
    assert group_similar(bits, 40).tolist() == [0] * 6
    assert group_similar(bits[:0]).tolist() == []


def test_many_fingerprints_are_grouped_as_by_comparing_each_pair(monkeypatch):
    monkeypatch.setattr("cpm_rcnn.data.near_duplicates._PAIRS", 1000)
    bits = np.random.default_rng(0).random((300, 24)) < 0.5
    near = (bits[:, None] != bits).sum(axis=2) <= 4
    expected = np.arange(len(bits))
    for _ in range(len(bits)):
        expected = np.where(near, expected, len(bits)).min(axis=1)
    assert 1 < len(np.unique(expected)) < 300
    assert np.array_equal(group_similar(bits, 4), expected)


def test_a_fraction_of_the_images_is_held_out_and_copies_stay_together(held_out, names):
    chosen = {seed: held_out(names, split_seed=seed) for seed in range(6)}
    for found in chosen.values():
        assert 6 <= len(found) <= round(0.3 * len(names))
        for name in found:
            assert {other for other in names if other[:2] == name[:2]} <= found
    assert len(set(map(frozenset, chosen.values()))) == 6
    assert any("_" in name for found in chosen.values() for name in found)


def test_the_choice_does_not_depend_on_the_order_of_the_images(held_out, names):
    expected = held_out(names)
    assert held_out(names[::-1]) == expected
    assert held_out(np.random.default_rng(0).permutation(names).tolist()) == expected


def test_images_of_a_fixed_camera_are_divided_with_a_warning(held_out, tmp_path, caplog):
    background = np.asarray(picture(0))
    (tmp_path / "camera").mkdir()
    names = []
    for number in range(10):
        pixels = background.copy()
        pixels[20 : 20 + 15, 15 * number : 15 * number + 20] = 255
        names.append(f"{number}.png")
        Image.fromarray(pixels).save(tmp_path / "camera" / names[-1])
    found = held_out(names, images=tmp_path / "camera")
    assert len(found) == 3
    assert held_out(names[::-1], images=tmp_path / "camera") == found
    assert "all.json: 10 of 10 images look alike, so that some may be in both splits" in caplog.text


def test_data_that_cannot_be_divided_is_refused(held_out, folder, names, tmp_path):
    with pytest.raises(ArgumentError, match=r"^val_fraction=0\.3: .*there is only one image"):
        held_out(names[:1])
    (tmp_path / "same").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / "same" / name).write_bytes((folder / names[0]).read_bytes())
    with pytest.raises(ArgumentError, match=r"^val_fraction=0\.3: .*all images are the same"):
        held_out(["a.jpg", "b.jpg", "c.jpg"], images=tmp_path / "same")


def test_an_image_that_cannot_be_read_is_named_or_taken_as_unlike_others(held_out, folder, names, tmp_path):
    (tmp_path / "damaged").mkdir()
    for name in names[:8]:
        (tmp_path / "damaged" / name).write_bytes((folder / name).read_bytes())
    path = tmp_path / "damaged" / names[3]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=rf"damaged: {names[3]} is damaged .*on_error=skip"):
        held_out(names[:8], images=tmp_path / "damaged")
    assert len(held_out(names[:8], images=tmp_path / "damaged", on_error="skip")) >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction=1.0: must be below 1"),
        ({"val_fraction": 0}, "val_fraction=0: must be above 0"),
        ({"val_fraction": "x"}, "val_fraction=x: must be a number"),
        ({"val_fraction": 0.2, "val_json": "a.json"}, "val_fraction=0.2: val_json=a.json names a validation split"),
        ({"split_seed": -1}, "split_seed=-1: must be an integer"),
        ({"negatives": 1}, "negatives=1: must be below 1"),
        ({"negatives": -0.1}, "negatives=-0.1: must be a number"),
        ({"format": "dota"}, "format=dota: must be one of auto, coco, yolo, voc, cvat"),
        ({"format": "voc", "train_json": "a.json"}, "format=voc: train_json names a COCO-style json"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ArgumentError) as error:
        DataSettings(**settings)
    assert str(error.value).startswith(message)
