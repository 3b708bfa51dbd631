import json
import pickle

import pytest
import torch
from PIL import Image

from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS, INCLUSIVE
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.dataset import CocoDataset
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.samplers import Sample
from cpm_rcnn.data.transforms import Resize, select_objects
from cpm_rcnn.errors import UserError

RESIZE = [Resize(40, 100)]


@pytest.fixture
def dataset(content, tmp_path):
    for number, image in enumerate(content["images"]):
        Image.new("RGB", (image["width"], image["height"]), (60 * number, 9, 9)).save(tmp_path / image["file_name"])

    def dataset(convention=CONTINUOUS, augmentations=RESIZE, seed=0):
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return CocoDataset(CocoAnnotations.load(path), ImageSource(tmp_path), augmentations, convention, seed)

    return dataset


def test_item_is_a_resized_image_with_its_target(dataset):
    image, target = dataset()[0]
    assert image.shape == (3, 40, 80)
    assert image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[0, 20, 21, 40]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1]
    assert target["labels"].dtype == torch.int64
    assert target["image_id"] == 30
    assert type(target["image_id"]) is int
    assert target["original_size"] == (20, 40)


def test_image_without_usable_objects_has_empty_targets(dataset):
    _, target = dataset()[2]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_inclusive_boxes_end_on_their_last_pixel(dataset):
    _, target = dataset(INCLUSIVE)[0]
    assert target["boxes"].tolist() == [[0, 20, 19, 38]]


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda convention: convention.name)
def test_every_target_has_an_area(content, dataset, convention):
    content["annotations"][1]["bbox"] = [3, 3, 0.2, 9]
    content["annotations"][2].update(bbox=[39.9, 3, 5, 9], iscrowd=0)
    _, target = dataset(convention)[0]
    assert (convention.area(target["boxes"]) > 0).all()
    assert len(target["boxes"]) == len(target["labels"]) == (1 if convention is INCLUSIVE else 2)


def test_image_with_another_size_than_in_the_json_is_refused(dataset, tmp_path):
    Image.new("RGB", (41, 20)).save(tmp_path / "c.png")
    with pytest.raises(
        UserError, match=r"c\.png is 41 x 20 pixels, but the annotations say 40 x 20 \(image 30 of .*instances\.json\)"
    ):
        dataset()[0]


def test_dataset_survives_pickling(dataset):
    before, after = dataset(), pickle.loads(pickle.dumps(dataset()))
    assert torch.equal(before[1][1]["boxes"], after[1][1]["boxes"])


def noise(image, target, rng):
    """An augmentation that shows what was drawn for a sample."""
    return image, target | {"drawn": torch.full((len(target["labels"]),), rng.bit_generator.random_raw() >> 1)}


def test_an_integer_is_a_row_and_its_own_sample_number(dataset):
    data = dataset(augmentations=[noise])
    for row in range(3):
        image, target = data[row]
        same_image, same_target = data[Sample(row, row)]
        assert torch.equal(image, same_image)
        assert torch.equal(target["drawn"], same_target["drawn"])
    assert not torch.equal(data[0][1]["drawn"], data[Sample(0, 1)][1]["drawn"])
    assert not torch.equal(data[0][1]["drawn"], dataset(augmentations=[noise], seed=1)[0][1]["drawn"])


def test_any_sampler_and_iteration_work(dataset):
    shuffled = torch.utils.data.DataLoader(dataset(), sampler=torch.utils.data.RandomSampler(range(3)), batch_size=None)
    assert sorted(target["image_id"] for _, target in shuffled) == [10, 20, 30]
    assert [target["image_id"] for _, target in dataset()] == [30, 10, 20]
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"row {index} of 3 images"):
            dataset()[index]


def test_augmentations_run_in_order_and_share_one_generator(dataset):
    seen = []

    def record(image, target, rng):
        seen.append((image.shape[-1], rng.bit_generator.random_raw()))
        return image, target

    dataset(augmentations=[record, Resize(40, 100), record])[0]
    assert [width for width, _ in seen] == [40, 80]
    dataset(augmentations=[record])[0]
    assert seen[2][1] == seen[0][1] != seen[1][1]


def test_objects_that_an_augmentation_removes_or_empties_are_removed_from_all_entries(dataset):
    def flatten_first(image, target, rng):
        boxes = target["boxes"].clone()
        boxes[0, 2] = boxes[0, 0]
        return image, target | {"boxes": boxes, "row": torch.arange(len(boxes))}

    def remove_last(image, target, rng):
        return image, select_objects(target, torch.arange(len(target["boxes"])) < len(target["boxes"]) - 1)

    _, target = dataset(augmentations=[flatten_first])[1]
    assert target["labels"].tolist() == [1]
    assert target["row"].tolist() == [1]
    _, target = dataset(augmentations=[remove_last])[1]
    assert target["labels"].tolist() == [2]
    assert target["boxes"].tolist() == [[2, 4, 8, 12]]
