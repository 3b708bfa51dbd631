import json
import shutil
import types
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.random import Philox
from omegaconf import OmegaConf
from PIL import Image

from cpm_rcnn.boxes import INCLUSIVE
from cpm_rcnn.data import CocoDataModule, DataSettings, ShapesDataModule, jpeg
from cpm_rcnn.data.mixing import Mosaic
from cpm_rcnn.data.samplers import Sample
from cpm_rcnn.data.settings import ShapesSettings
from cpm_rcnn.data.shapes import CATEGORIES, CLASSES, write_shapes
from cpm_rcnn.errors import ArgumentError, UserError

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = {"num_workers": 0, "short_sides": (64, 80), "max_size": 120, "test_short_side": 64, "test_max_size": 120}
FILES = {
    "train_json": "annotations/instances_train.json",
    "train_images": "train",
    "val_json": "annotations/instances_val.json",
    "val_images": "val",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, 12, 5)
    return root


@pytest.fixture
def module(root):
    def module(**changes):
        return CocoDataModule(**{"root": str(root), **FILES, **OPTIONS, "batch_size": 3, "max_steps": 8, **changes})

    return module


def same(batch, other):
    return all(torch.equal(*pair) for pair in zip(batch[0], other[0])) and all(
        torch.equal(a["boxes"], b["boxes"]) and a["image_id"] == b["image_id"] for a, b in zip(batch[1], other[1])
    )


def test_training_batches_are_as_configured(module):
    batches = list(module().train_dataloader())
    assert len(batches) == 8
    sizes = set()
    for images, targets in batches:
        assert len(images) == len(targets) == 3
        assert len({image.shape[1] > image.shape[2] for image in images}) == 1
        assert all(image.dtype == torch.uint8 for image in images)
        assert all(len(target["boxes"]) for target in targets)
        sizes |= {min(image.shape[1:]) for image in images}
    assert sizes == {64, 80}


def test_small_objects_and_images_with_no_others_are_left_out_of_training_but_not_of_validation(root, module, tmp_path):
    content = json.loads((root / FILES["train_json"]).read_text())
    first, second = content["images"][:2]
    for annotation in content["annotations"]:
        if annotation["image_id"] == first["id"]:
            annotation["bbox"][2] = 1.0
    small = next(a for a in content["annotations"] if a["image_id"] == second["id"])
    small["bbox"][3] = 0.5
    (tmp_path / "small.json").write_text(json.dumps(content))
    files = {f"{split}_json": str(tmp_path / "small.json") for split in ("train", "val")} | {"val_images": "train"}
    number = sum(a["image_id"] == second["id"] for a in content["annotations"])
    for limit, trained, boxes in ((0, True, number), (1, False, number - 1)):
        data = module(**files, min_box_size=limit, max_steps=12)
        targets = {t["image_id"]: t for _, batch in data.train_dataloader() for t in batch}
        assert (first["id"] in targets) == trained
        assert len(targets[second["id"]]["boxes"]) == boxes
        assert data.annotations("val").usable.all()


def test_without_a_large_enough_object_training_is_refused_with_the_limit(module):
    with pytest.raises(UserError, match=r"no image has an object to train on \(crowds or boxes of at most 9999 pixels"):
        module(min_box_size=9999).train_dataloader()


def test_resize_rounding_reaches_the_training_images_only(module):
    options = {"short_sides": [65], "max_size": 200, "test_short_side": 65, "test_max_size": 200}
    data = module(**options, resize_rounding="down", val_json=FILES["train_json"], val_images="train")
    for loader, to_pixels in ((data.train_dataloader(), int), (data.val_dataloader(), round)):
        samples = [sample for images, targets in loader for sample in zip(images, targets)]
        exact = [65 / min(t["original_size"]) * max(t["original_size"]) for _, t in samples]
        assert any(int(side) != round(side) for side in exact)
        assert [max(image.shape) for image, _ in samples] == list(map(to_pixels, exact))


def test_with_one_orientation_per_process_square_images_count_as_portrait(root, module, tmp_path):
    content = json.loads((root / FILES["train_json"]).read_text())
    (tmp_path / "train").mkdir()
    for i, image in enumerate(content["images"]):
        image["width"], image["height"] = [(90, 60), (60, 90), (60, 60)][i % 3]
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / "train" / image["file_name"])
    for annotation in content["annotations"]:
        annotation["bbox"] = [5, 5, 40, 40]
    (tmp_path / "train.json").write_text(json.dumps(content))
    files = {"train_json": str(tmp_path / "train.json"), "train_images": str(tmp_path / "train")}

    def shapes_of(orientation):
        """For each step, the widths and heights of the images of each of two ranks."""
        parts = []
        for rank in range(2):
            data = module(**files, batch_orientation=orientation, batch_size=2, max_steps=60)
            data.trainer = types.SimpleNamespace(global_rank=rank, world_size=2)
            parts.append([[t["original_size"] for t in batch] for _, batch in data.train_dataloader()])
        return list(zip(*parts))

    wide = lambda sizes, or_square: {w > h or (or_square and w == h) for h, w in sizes}  # noqa: E731
    assert all(len(wide(first + second, True)) == 1 for first, second in shapes_of("step"))
    steps = shapes_of("process")
    assert all(len(wide(part, False)) == 1 for step in steps for part in step)
    assert any(wide(first, False) != wide(second, False) for first, second in steps)


def test_draws_of_a_sample_are_pinned_the_first_word_scales_and_the_second_flips(module):
    number, flips = 0, 0
    options = {"seed": 5, "max_steps": 4, "max_size": 999}
    data, plain = module(**options), module(**options, flip_probability=0.0)
    for (images, _), (unflipped, _) in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        for image, other in zip(images, unflipped):
            scale, mirror = (int(word) / 2**64 for word in Philox(key=[5, number]).random_raw(2))
            assert min(image.shape[1:]) == (64, 80)[int(scale * 2)]
            assert torch.equal(image, other.flip(-1) if mirror < 0.5 else other)
            number, flips = number + 1, flips + (mirror < 0.5)
    assert 0 < flips < number == 12


def test_any_number_of_workers_gives_the_same_batches(module):
    for batch, other in zip(module().train_dataloader(), module(num_workers=2).train_dataloader(), strict=True):
        assert same(batch, other)


def test_resumed_run_continues_with_the_same_batches(module):
    resumed = module()
    resumed.start_step = 5
    rest = list(resumed.train_dataloader())
    assert len(rest) == 3
    assert all(same(*pair) for pair in zip(list(module().train_dataloader())[5:], rest))


def test_ranks_of_an_attached_trainer_split_the_global_batch(module):
    parts = []
    for rank in range(2):
        part = module()
        part.trainer = types.SimpleNamespace(global_rank=rank, world_size=2)
        parts.append(list(part.train_dataloader()))
    for whole, first, second in zip(module(batch_size=6).train_dataloader(), *parts, strict=True):
        assert same(whole, (first[0] + second[0], first[1] + second[1]))


def test_validation_yields_every_image_once_in_order(module):
    ids = [target["image_id"] for _, targets in module(eval_batch_size=2).val_dataloader() for target in targets]
    assert ids == [1, 2, 3, 4, 5]


def test_lightning_fits_and_resumes_with_these_loaders(module, tmp_path):
    class Recorder(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def training_step(self, batch, index):
            self.seen.append([target["image_id"] for target in batch[1]])
            return self.weight * 1.0

        def validation_step(self, batch, index):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(data, max_steps, checkpoint=None):
        recorder = Recorder()
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=max_steps, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(recorder, data, ckpt_path=checkpoint, weights_only=False)
        return trainer, recorder.seen

    whole = fit(module(), 8)[1]
    assert len(whole) == 8
    trainer, first = fit(module(), 5)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    resumed = module()
    resumed.start_step = 5
    assert first + fit(resumed, 8, str(tmp_path / "five.ckpt"))[1] == whole


def test_images_without_usable_objects_are_not_used_in_training(root, module, tmp_path):
    content = json.loads((root / FILES["train_json"]).read_text())
    keep = content["annotations"][0]["image_id"]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] == keep]
    (tmp_path / "one.json").write_text(json.dumps(content))
    batches = module(train_json=str(tmp_path / "one.json")).train_dataloader()
    assert {target["image_id"] for _, targets in batches for target in targets} == {keep}
    for item in content["annotations"]:
        item["iscrowd"] = 1
    (tmp_path / "one.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"one\.json: no image has an object to train on"):
        module(train_json=str(tmp_path / "one.json")).train_dataloader()


def test_categories_come_from_the_training_json_or_the_caller(module, tmp_path):
    assert module().categories == CATEGORIES
    assert module(train_json=None).categories == CATEGORIES
    given = [{"id": 8, "name": "blob"}, *CATEGORIES]
    assert module(categories=given, train_json="none.json").categories == [*CATEGORIES, given[0]]
    assert module(categories=given).annotations("val").category_names[-1] == "blob"


def test_validation_with_other_categories_than_training_is_refused(root, module, tmp_path):
    content = json.loads((root / FILES["val_json"]).read_text())
    content["categories"][2]["name"] = "pyramid"
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"val\.json: 1 category that the model does not know .*category 3: 'pyramid'"):
        module(val_json=str(tmp_path / "val.json")).val_dataloader()


def composed(name):
    """The config of a data set, as a command composes it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = compose(overrides=[f"+data={name}"]).data
    schedule = {"short_sides": [640, 800], "max_size": 1300, "test_short_side": 700, "test_max_size": 1200}
    return OmegaConf.create({"schedule": schedule, "data": data})


def test_missing_root_is_reported_in_one_line_with_the_expected_files_and_the_source_of_coco(tmp_path):
    config = composed("coco").data
    files = {key: config[key] for key in config if key.endswith(("_json", "_images"))}
    with pytest.raises(ArgumentError) as error:
        CocoDataModule(root=str(tmp_path / "coco"), max_steps=1, **files).train_dataloader()
    assert error.value.argument == "train_json"
    message = str(error.value)
    assert "\n" not in message
    for part in (
        f"train_json={tmp_path}/coco/annotations/instances_train2017.json: no such file or folder",
        "train2017/ or train2017.zip",
        "annotations/instances_val2017.json",
        "cocodataset.org",
    ):
        assert part in message


def test_missing_image_folder_is_named_by_its_argument(module):
    with pytest.raises(ArgumentError, match=r"^val_images=.*/nowhere: no such file or folder"):
        module(val_images="nowhere").val_dataloader()


def test_split_that_is_not_configured_is_named_by_its_argument(module):
    with pytest.raises(ArgumentError, match=r"^test_json=null: set it to use the test split"):
        module().test_dataloader()


def test_test_split_needs_no_annotations(root, module, tmp_path):
    content = json.loads((root / FILES["val_json"]).read_text())
    del content["annotations"]
    (tmp_path / "info.json").write_text(json.dumps(content))
    data = module(test_json=str(tmp_path / "info.json"), test_images="val")
    assert not data.annotations("test").has_annotations
    assert len(list(data.test_dataloader())) == 5


def test_training_without_a_number_of_steps_is_refused(module):
    with pytest.raises(ArgumentError, match=r"^max_steps=None"):
        module(max_steps=None).train_dataloader()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("eval_batch_size", 0),
        ("num_workers", -1),
        ("short_sides", ()),
        ("short_sides", (800, 0)),
        ("max_size", 0),
        ("test_short_side", 0),
        ("test_max_size", 0),
        ("flip_probability", 1.5),
        ("seed", -1),
        ("max_steps", 0),
        ("convention", "round"),
        ("on_error", "ignore"),
    ],
)
def test_value_out_of_range_is_refused_by_its_argument(module, key, value):
    with pytest.raises(ArgumentError, match=f"^{key}=") as error:
        module(**{key: value})
    assert error.value.argument == key


def test_unknown_option_is_refused_with_the_allowed_ones(module):
    with pytest.raises(ArgumentError, match=r"^short_side: unknown option; allowed: root, train_json, .*short_sides"):
        module(short_side=800)


def test_shapes_are_rendered_by_prepare_data_and_their_categories_are_known_before(tmp_path):
    data = ShapesDataModule(root=str(tmp_path / "new"), train_count=2, val_count=1, **OPTIONS)
    assert data.categories == CATEGORIES
    with pytest.raises(ArgumentError, match=r"^val_json="):
        data.val_dataloader()
    data.prepare_data()
    assert len(data.annotations("train")) == 2
    assert len(list(data.val_dataloader())) == 1
    with pytest.raises(ArgumentError, match=r"^train_count=0"):
        ShapesDataModule(root=str(tmp_path), train_count=0, **OPTIONS)


@pytest.mark.parametrize("name", ["coco", "shapes", "custom"])
def test_config_builds_its_data_module(name):
    config = composed(name)
    if name == "custom":
        config.data.update(FILES)
    built = instantiate(config.data, batch_size=4, max_steps=10, seed=3)
    assert isinstance(built, ShapesDataModule if name == "shapes" else CocoDataModule)
    assert (built.batch_size, built.max_steps, built.seed) == (4, 10, 3)
    assert built.settings.short_sides == [640, 800]
    assert built.settings.num_workers == (2 if name == "shapes" else 4)


def test_configs_have_exactly_the_settings_and_the_same_defaults():
    paths = {f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("json", "images")}
    found = {"format", "val_fraction", "split_seed"}
    assert set(composed("custom").data) - {"_target_"} == set(DataSettings.names())
    assert set(composed("coco").data) - {"_target_"} == set(DataSettings.names()) - found
    assert set(composed("shapes").data) - {"_target_"} == set(ShapesSettings.names()) - paths - found
    shared = OmegaConf.to_container(OmegaConf.load(CONF / "data/shared/options.yaml"))
    assert shared["on_error"] == DataSettings().on_error
    assert shared["check_images"] == DataSettings().check_images
    assert shared["flip_probability"] == DataSettings().flip_probability
    assert (shared["classes"], shared["negatives"]) == (DataSettings().classes, DataSettings().negatives)
    assert all(composed("custom").data[name] == getattr(DataSettings(), name) for name in paths | found)
    shapes, defaults = composed("shapes").data, ShapesSettings()
    assert (shapes.root, shapes.train_count, shapes.val_count) == (
        defaults.root,
        defaults.train_count,
        defaults.val_count,
    )


def test_error_in_a_worker_ends_with_its_one_line_message(root, module, tmp_path):
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError) as error:
        next(iter(module(val_images=str(tmp_path / "val"), num_workers=1).val_dataloader()))
    last = str(error.value).strip().splitlines()[-1]
    image = f"image 1 of {root}/annotations/instances_val.json"
    advice = "on_error=skip continues without such images"
    assert last == f"cpm_rcnn.errors.UserError: {tmp_path}/val: image 000001.jpg not found ({image}); {advice}"


def test_with_skip_batches_do_not_depend_on_the_number_of_workers_and_an_unreadable_image_is_reported_once(
    root, module, tmp_path, caplog
):
    shutil.copytree(root / "train", tmp_path / "train")
    for name in ("000001.jpg", "000002.jpg"):
        (tmp_path / "train" / name).write_bytes(b"")
    changes = {"train_images": str(tmp_path / "train"), "on_error": "skip", "max_steps": 20}
    batches = list(module(**changes).train_dataloader())
    assert len([line for line in caplog.messages if "is empty" in line]) == 2
    workers = module(**changes, num_workers=2).train_dataloader()
    for batch, other in zip(batches, workers, strict=True):
        assert same(batch, other)
    assert workers.dataset.faults.unreadable.sum() == 2
    seen = {target["image_id"] for _, targets in batches for target in targets}
    assert seen.isdisjoint({1, 2})
    with pytest.raises(UserError, match=r"00000[12]\.jpg is empty"):
        list(module(**changes | {"on_error": "raise"}).train_dataloader())


def test_evaluation_arguments_keep_on_error(module):
    assert module(on_error="skip").evaluation_arguments["on_error"] == "skip"
    assert module().evaluation_arguments["on_error"] == "raise"


@pytest.mark.parametrize("kind", [CocoDataModule, ShapesDataModule])
def test_evaluation_arguments_make_a_module_of_the_same_evaluation_data(root, kind, monkeypatch):
    monkeypatch.chdir(root.parent)
    files = FILES | {"test_json": FILES["val_json"], "test_images": "val"} if kind is CocoDataModule else {}
    trained = kind(root="shapes", convention="inclusive", eval_batch_size=2, **files, **OPTIONS)
    arguments = trained.evaluation_arguments
    assert json.loads(json.dumps(arguments)) == arguments
    expected = list(trained.val_dataloader())
    monkeypatch.chdir("/")
    again = CocoDataModule(**arguments, categories=trained.categories, convention="inclusive")
    assert again.root == root
    assert again.convention is INCLUSIVE
    names = DataSettings.names("inference")
    assert set(arguments) == set(names)
    for name in set(names) - {"root"}:
        assert getattr(again.settings, name) == getattr(trained.settings, name)
    assert all(same(*pair) for pair in zip(again.val_dataloader(), expected, strict=True))


def test_augmentations_can_be_added(module):
    def darken(image, target, rng):
        return image // 2, target | {"drawn": torch.full(target["labels"].shape, rng.random())}

    data = module()
    data.train_augmentations.append(darken)
    plain = list(module().train_dataloader())
    darkened = list(data.train_dataloader())
    assert all(torch.equal(image // 2, other) for image, other in zip(plain[0][0], darkened[0][0]))
    assert len({target["drawn"][0].item() for _, targets in darkened for target in targets}) == 24


STRONG = {"augment": "strong", "quarter_turns": True}


def test_with_all_augmentations_batches_do_not_depend_on_the_number_of_workers_and_resume_exactly(module):
    batches = list(module(**STRONG).train_dataloader())
    for batch, other in zip(batches, module(**STRONG, num_workers=2).train_dataloader(), strict=True):
        assert same(batch, other)
    resumed = module(**STRONG)
    resumed.start_step = 5
    rest = list(resumed.train_dataloader())
    assert len(rest) == 3
    assert all(same(*pair) for pair in zip(batches[5:], rest))
    assert not any(same(*pair) for pair in zip(batches, module(augment="standard").train_dataloader()))


def test_a_mixed_in_image_that_cannot_be_read_is_named_or_replaced(root, module, tmp_path, caplog):
    shutil.copytree(root / "train", tmp_path / "train")
    (tmp_path / "train" / "000001.jpg").write_bytes(b"")
    changes = {**STRONG, "train_images": str(tmp_path / "train")}
    data = module(**changes, on_error="skip")
    data.train_augmentations = [Mosaic(1.0, data.convention)]
    dataset = data.train_dataloader().dataset
    mosaics = [dataset[Sample(4, number)] for number in range(20)]
    assert len({image.float().mean().item() for image, _ in mosaics}) > 15
    assert len([line for line in caplog.messages if "000001.jpg is empty" in line]) == 1
    data = module(**changes, on_error="raise")
    data.train_augmentations = [Mosaic(1.0, data.convention)]
    dataset = data.train_dataloader().dataset
    with pytest.raises(UserError, match=r"000001\.jpg is empty.*image 1 of"):
        [dataset[Sample(4, number)] for number in range(20)]


# --- a held-out validation split, negatives, classes ---


@pytest.fixture
def held_out(module, monkeypatch):
    """A module of the training images only, of which a third are held out, with every seventh image empty."""

    def held_out(**changes):
        changes = {"val_json": None, "val_images": None, "val_fraction": 0.34, "negatives": 0.3, **changes}
        return module(train_json=str(tmp_json), classes=["star", {"box": ["square", "cross"]}], **changes)

    content = json.loads((module().root / FILES["train_json"]).read_text())
    empty = {image["id"] for image in content["images"][::4]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in empty]
    tmp_json = module().root / "annotations" / "some_empty.json"
    tmp_json.write_text(json.dumps(content))
    return held_out


def test_a_held_out_split_with_negatives_and_classes_is_independent_of_workers_and_resumes_exactly(held_out):
    data = held_out()
    data.setup("fit")
    batches = list(data.train_dataloader())
    ids = {target["image_id"] for _, targets in batches for target in targets}
    validation = {target["image_id"] for _, (target,) in data.val_dataloader()}
    assert len(validation) == 4
    assert ids.isdisjoint(validation)
    sizes = [len(target["boxes"]) for _, targets in batches for target in targets]
    assert 6 <= sizes.count(0) <= 9  # 30% of 24
    assert {label for _, targets in batches for t in targets for label in t["labels"].tolist()} == {1, 2}
    for batch, other in zip(batches, held_out(num_workers=2).train_dataloader(), strict=True):
        assert same(batch, other)
    resumed = held_out()
    resumed.start_step = 5
    assert all(same(*pair) for pair in zip(batches[5:], resumed.train_dataloader(), strict=True))


def test_evaluation_arguments_find_the_held_out_images_again(held_out):
    trained = held_out(split_seed=3)
    again = CocoDataModule(**trained.evaluation_arguments, categories=trained.categories)
    again.setup("validate")
    assert all(same(*pair) for pair in zip(again.val_dataloader(), trained.val_dataloader(), strict=True))
    other = held_out(split_seed=4)
    assert set(other.annotations("val").image_ids) != set(trained.annotations("val").image_ids)


def test_held_out_images_are_not_reported_as_shared_with_training(held_out, caplog):
    held_out().setup("fit")
    assert caplog.messages == []


def test_small_boxes_count_in_the_validation_part_only(held_out):
    data = held_out(min_box_size=9999, negatives=0.0)
    assert not data.annotations("train").usable.any()
    assert data.annotations("val").usable.all()


def test_negatives_are_checked_before_the_first_step(module, held_out, copy):
    with pytest.raises(ArgumentError, match=r"^negatives=0\.2: .*instances_train\.json has no image without objects"):
        module(negatives=0.2, train_json=FILES["train_json"], classes=list(CLASSES)).train_dataloader()
    data = held_out(root=str(copy))
    empty = data.annotations("train").images_without_objects()
    missing = str(data.annotations("train").file_names[empty[0]])
    (copy / "train" / missing).unlink()
    with pytest.raises(UserError, match=f"1 of .* images cannot be read .image {missing} not found"):
        data.setup("fit")


def test_negatives_in_another_orientation_than_all_other_images_are_refused(root, module, tmp_path):
    content = json.loads((root / FILES["train_json"]).read_text())
    landscape = {image["id"] for image in content["images"] if image["height"] <= image["width"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in landscape]
    filled = {entry["image_id"] for entry in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in filled]
    content["images"].append({"id": 99, "file_name": "000001.jpg", "height": 20, "width": 10})
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match=r"^negatives=0\.2: .*do not have the orientation of the others"):
        module(negatives=0.2, train_json=str(tmp_path / "train.json")).train_dataloader()


def test_shapes_can_be_a_subset_of_their_classes(root):
    data = ShapesDataModule(root=str(root), train_count=12, val_count=5, classes=["star", "circle"], **OPTIONS)
    data.prepare_data()
    assert data.categories == [{"id": 1, "name": "star"}, {"id": 2, "name": "circle"}]
    assert set(data.annotations("train").labels) <= {1, 2}


# --- what is checked before the first step ---


@pytest.fixture
def copy(root, tmp_path):
    """A copy of the data set that a test may damage."""
    return shutil.copytree(root, tmp_path / "copy")


@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("fit", "val"), ("validate", "val"), ("test", "test")])
def test_missing_images_are_all_named_before_the_first_step(module, copy, stage, split):
    folder = copy / ("train" if split == "train" else "val")
    for number in (1, 2, 3, 4):
        (folder / f"{number:06d}.jpg").unlink()
    data = module(root=str(copy), test_json=FILES["val_json"], test_images="val")
    with pytest.raises(UserError) as error:
        data.setup(stage)
    total = len(data.annotations("train").images_with_objects()) if split == "train" else 5
    first = ", ".join(f"image 00000{number}.jpg not found" for number in (1, 2, 3))
    assert f"{folder}: 4 of {total} images cannot be read ({first}, ...), which {copy}/annotations/" in str(error.value)
    assert str(error.value).endswith("skip these images with on_error=skip")


def test_with_skip_missing_images_are_treated_as_unreadable_with_one_warning(root, module, copy, caplog):
    for name in ("train/000001.jpg", "train/000002.jpg", "val/000003.jpg"):
        (copy / name).unlink()
    checked, unchecked = (module(root=str(copy), on_error="skip") for _ in range(2))
    checked.setup("fit")
    checked.setup("validate")
    assert len(caplog.messages) == 2
    assert "2 of " in caplog.messages[0]
    assert "replaced by other images (on_error=skip)" in caplog.messages[0]
    assert "1 of 5 images cannot be read (image 000003.jpg not found)" in caplog.messages[1]
    assert "treated as images without detections (on_error=skip)" in caplog.messages[1]
    batches = list(checked.train_dataloader())
    assert [target["readable"] for _, (target,) in checked.val_dataloader()] == [True, True, False, True, True]
    assert len(caplog.messages) == 2
    assert all(same(*pair) for pair in zip(batches, unchecked.train_dataloader(), strict=True))


def test_a_folder_without_any_of_the_images_is_refused_also_with_skip(module, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^val_images=.*5 of 5 images cannot be read .*; must be the folder or \.zip"):
        module(val_images=str(tmp_path / "empty"), on_error="skip").setup("validate")


def test_training_images_without_objects_may_be_missing(module, copy):
    content = json.loads((copy / FILES["train_json"]).read_text())
    content["images"].append({"id": 99, "file_name": "none.jpg", "height": 5, "width": 5})
    (copy / FILES["train_json"]).write_text(json.dumps(content))
    module(root=str(copy)).setup("fit")


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_check_images_finds_wrong_sizes_formats_and_ends_before_the_first_step(module, copy, on_error, caplog, capfd):
    Image.new("RGB", (8, 8)).save(copy / "val/000001.jpg")
    (copy / "val/000002.jpg").write_bytes(b"text")
    raw = (copy / "val/000003.jpg").read_bytes()
    (copy / "val/000003.jpg").write_bytes(raw[: len(raw) // 2])
    raw = (copy / "val/000004.jpg").read_bytes()
    (copy / "val/000004.jpg").write_bytes(raw[:-20])
    module(root=str(copy), on_error=on_error).setup("validate")
    data = module(root=str(copy), on_error=on_error, check_images=True)
    if on_error == "raise":
        with pytest.raises(UserError) as error:
            data.setup("validate")
        message = str(error.value)
    else:
        data.setup("validate")
        (message,) = caplog.messages
        assert [target["readable"] for _, (target,) in data.val_dataloader()] == [False, False, False, True, True]
        assert "000004.jpg ends early" in caplog.messages[1]
        list(data.val_dataloader())
        assert len(caplog.messages) == 2, "each file is reported once per run"
    assert "3 of 5 images cannot be read (000001.jpg is 8 x 8 pixels, but the annotations say " in message
    assert "000003.jpg ends early" in message
    assert "check images of instances_val.json" in capfd.readouterr().err


def test_a_jpeg_that_ends_early_is_reported_once_by_all_workers(module, copy):
    raw = (copy / "val/000001.jpg").read_bytes()
    (copy / "val/000001.jpg").write_bytes(raw[:-20])
    loader = module(root=str(copy), num_workers=2).val_dataloader()
    for _ in range(2):
        assert all(target["readable"] for _, (target,) in loader)
    assert loader.dataset.faults.ends_early.tolist() == [True, False, False, False, False]


def test_the_same_images_in_training_and_validation_are_named(root, module, tmp_path, caplog):
    module().setup("fit")
    assert caplog.messages == []
    module(val_json=FILES["train_json"], val_images="train").setup("fit")
    assert "instances_train.json is used for training and for validation" in caplog.messages[0]
    content = json.loads((root / FILES["train_json"]).read_text())
    content["images"] = content["images"][:3]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] <= 3]
    content["images"][0]["file_name"] = ".\\000001.jpg"
    (tmp_path / "part.json").write_text(json.dumps(content))
    module(val_json=str(tmp_path / "part.json"), val_images="train").setup("fit")
    assert "3 of 3 validation images are also training images (.\\000001.jpg, ...); " in caplog.messages[1]
    assert len(caplog.messages) == 2


def test_a_run_without_a_validation_split_is_set_up(module):
    module(val_json=None).setup("fit")


def test_absolute_file_names_inside_the_image_folder_are_read(root, module, tmp_path):
    content = json.loads((root / FILES["val_json"]).read_text())
    for item in content["images"]:
        item["file_name"] = str(root / "val" / item["file_name"])
    (tmp_path / "val.json").write_text(json.dumps(content))
    data = module(val_json=str(tmp_path / "val.json"))
    data.setup("validate")
    assert all(same(*pair) for pair in zip(data.val_dataloader(), module().val_dataloader(), strict=True))
    with pytest.raises(UserError, match="5 images whose file_name leaves the image folder"):
        module(val_json=str(tmp_path / "val.json"), val_images="train").setup("validate")


def test_an_empty_list_of_categories_is_refused(root, module, tmp_path):
    content = json.loads((root / FILES["train_json"]).read_text())
    (tmp_path / "none.json").write_text(json.dumps(content | {"categories": [], "annotations": []}))
    with pytest.raises(UserError, match=r"none\.json: 'categories' is empty, so there is nothing to detect"):
        _ = module(train_json=str(tmp_path / "none.json")).categories
    with pytest.raises(ArgumentError, match=r"^categories\[0\]\.id='a': must be an integer"):
        module(categories=[{"id": "a", "name": "cat"}])


def test_only_missing_files_of_coco_show_where_to_download_coco(module, tmp_path):
    for name, shown in (("annotations/instances_val2017.json", True), ("annotations/val.json", False)):
        with pytest.raises(ArgumentError) as error:
            module(root=str(tmp_path), val_json=name).val_dataloader()
        assert ("cocodataset.org" in str(error.value)) == shown
        assert f"expected in {tmp_path}: " in str(error.value)


def test_a_missing_fast_decoder_is_reported_once(module, monkeypatch, caplog):
    monkeypatch.setattr(jpeg, "decode_jpeg", None)
    data = module()
    for stage in ("fit", "validate"):
        data.setup(stage)
    assert caplog.messages == ["simplejpeg is not installed, so JPEGs are decoded by Pillow, which takes longer"]
