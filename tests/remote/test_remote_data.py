"""The data module on remote data, compared with the same local files."""

import io
import json
import shutil
import zipfile

import pytest
import torch
from torch.utils.data import DataLoader

from cpm_rcnn.data import CocoDataModule, ShapesDataModule
from cpm_rcnn.data.formats import find_layout
from cpm_rcnn.data.shapes import write_shapes
from cpm_rcnn.errors import ArgumentError, UnavailableError, UserError
from cpm_rcnn.remote.urls import Url
from remote_servers import upload

FILES = {
    f"{split}_{kind}": name.format(split)
    for split in ("train", "val")
    for kind, name in (("json", "annotations/instances_{}.json"), ("images", "{}"))
}
OPTIONS = {"short_sides": (64, 96), "max_size": 128, "test_short_side": 64, "test_max_size": 128, "num_workers": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, 8, 3)
    return root


@pytest.fixture(scope="module")
def contents(root):
    """The files of the data set by name, and archives of the images."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for split in ("train", "val"):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as writer:
            for name, content in files.items():
                if name.startswith(f"{split}/"):
                    writer.writestr(name, content)
        files[f"{split}.zip"] = archive.getvalue()
    return files


@pytest.fixture
def on_http(http, contents):
    """A server with the data set at ``/data``."""
    http.files.update({f"/data/{name}": content for name, content in contents.items()})
    return http


def module(root, **changes) -> CocoDataModule:
    return CocoDataModule(**{"root": str(root), **FILES, **OPTIONS, "batch_size": 2, "max_steps": 6, **changes})


def batches(data: CocoDataModule) -> list:
    data.setup("fit")
    return [*items(data.train_dataloader()), *items(data.val_dataloader())]


def items(loader: DataLoader) -> list:
    iterator = iter(loader)
    try:
        return list(iterator)
    finally:
        if loader.num_workers:
            # The garbage collection of a loader that has failed would wait for its workers for many seconds.
            iterator._shutdown_workers()


def assert_same(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for (images, targets), (other_images, other_targets) in zip(found, expected, strict=True):
        assert all(map(torch.equal, images, other_images))
        for target, other in zip(targets, other_targets, strict=True):
            assert target["image_id"] == other["image_id"]
            assert torch.equal(target["boxes"], other["boxes"])
            assert torch.equal(target["labels"], other["labels"])


@pytest.mark.parametrize("server", ["http", "s3"])
@pytest.mark.parametrize("archives", [False, True])
def test_batches_equal_those_of_local_files_with_any_number_of_workers_and_after_a_resume(
    request, root, contents, server, archives
):
    server_of_kind = request.getfixturevalue("on_http" if server == "http" else "s3")
    if server == "s3":
        upload(server_of_kind, "shapes", contents)
    place = f"{server_of_kind.url}/data" if server == "http" else "s3://shapes"
    images = {"train_images": "train.zip", "val_images": "val.zip"} if archives else {}
    options = {"augment": "strong", "seed": 3}
    expected = batches(module(root, **options))
    assert_same(batches(module(place, **images, **options)), expected)
    resumed = module(place, **images, **options, num_workers=2)
    resumed.start_step = 2
    assert_same(batches(resumed), expected[2:])


def test_a_second_run_transfers_no_image_again(on_http, root):
    expected = batches(module(f"{on_http.url}/data"))
    on_http.requests.clear()
    assert_same(batches(module(f"{on_http.url}/data")), expected)
    assert on_http.asked("GET") == []


def test_a_cache_smaller_than_the_data_gives_the_same_batches(on_http, root, contents, cache, monkeypatch):
    monkeypatch.setenv("CPM_RCNN_CACHE_GB", str(1.1e-9 * len(contents["annotations/instances_train.json"])))
    assert_same(batches(module(f"{on_http.url}/data", num_workers=2)), batches(module(root)))
    held = sum(path.stat().st_size for path in cache.glob("???/*"))
    assert 0 < held <= 1.1 * len(contents["annotations/instances_train.json"])


def test_failures_of_the_server_do_not_change_the_batches(on_http, root):
    for number, name in enumerate(list(on_http.files)):
        on_http.faults[name] = [[500, 503], ["truncate"], ["short", 429], []][number % 4]
    assert_same(batches(module(f"{on_http.url}/data", num_workers=2)), batches(module(root)))


def test_a_wrong_image_folder_is_reported_before_the_first_step(on_http):
    with pytest.raises(UserError, match=r"/data/trian: 1 of \d images cannot be read \(image \S+ not found\), which"):
        module(f"{on_http.url}/data", train_images="trian").setup("fit")


def missing_image(server, contents) -> str:
    """Remove the last image from the server, which is not the one that is looked for at the start."""
    name = json.loads(contents["annotations/instances_train.json"])["images"][-1]["file_name"]
    del server.files[f"/data/train/{name}"]
    return name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_image_is_named_when_it_is_read(on_http, contents, workers):
    name = missing_image(on_http, contents)
    with pytest.raises(UserError, match=rf"/data/train: image {name} not found \(image \d+ of http.*/annotations/"):
        batches(module(f"{on_http.url}/data", num_workers=workers))


def test_with_skip_a_missing_image_is_replaced_as_a_local_one(on_http, contents, root, tmp_path):
    local = tmp_path / "local"
    shutil.copytree(root, local)
    name = missing_image(on_http, contents)
    (local / "train" / name).unlink()
    found = batches(module(f"{on_http.url}/data", on_error="skip", num_workers=2))
    assert_same(found, batches(module(local, on_error="skip")))


@pytest.mark.parametrize("check_images", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_with_skip_an_image_of_a_server_that_fails_is_not_replaced(on_http, contents, workers, check_images):
    name = json.loads(contents["annotations/instances_train.json"])["images"][-1]["file_name"]
    on_http.faults[f"/data/train/{name}"] = [500] * 99
    data = module(f"{on_http.url}/data", on_error="skip", num_workers=workers, check_images=check_images)
    with pytest.raises(
        UnavailableError, match=rf"/data/train/{name}: cannot be read after 4 attempts \(HTTP status 500"
    ):
        batches(data)


def test_check_images_reads_all_images_before_the_first_step(on_http, contents):
    name = missing_image(on_http, contents)
    with pytest.raises(
        UserError, match=rf"/data/train: 1 of \d images cannot be read \({name} cannot be read|image {name}"
    ):
        module(f"{on_http.url}/data", check_images=True).setup("fit")


def test_an_invalid_or_missing_json_is_named_by_its_url(on_http, contents):
    on_http.files["/data/annotations/instances_train.json"] = b"{"
    with pytest.raises(UserError, match=r"^http://127.0.0.1:\d+/data/annotations/instances_train.json: not valid JSON"):
        module(f"{on_http.url}/data").setup("fit")
    del on_http.files["/data/annotations/instances_val.json"]
    with pytest.raises(UserError, match=r"^http://127.0.0.1:\d+/data/annotations/instances_val.json: no such file$"):
        module(f"{on_http.url}/data").annotations("val")


def test_local_annotations_may_have_remote_images(on_http, root):
    jsons = {name: str(root / value) for name, value in FILES.items() if name.endswith("_json")}
    assert_same(batches(module(f"{on_http.url}/data", **jsons)), batches(module(root)))


def test_held_out_validation_images_do_not_depend_on_where_the_data_are(on_http, root):
    options = {"val_json": None, "val_images": None, "val_fraction": 0.3}
    found = module(f"{on_http.url}/data", **options).annotations("val").file_names.tolist()
    assert found == module(root, **options).annotations("val").file_names.tolist()


def test_evaluation_arguments_keep_the_url(on_http):
    arguments = module(f"{on_http.url}/data/?key=1").evaluation_arguments
    assert arguments["root"] == f"{on_http.url}/data/?key=1"


def test_a_remote_root_without_named_files_is_refused():
    with pytest.raises(
        ArgumentError, match=r"^root=s3://bucket/data: remote folders are not searched .* train_json=FILE"
    ):
        CocoDataModule(root="s3://bucket/data").annotations("train")
    with pytest.raises(ArgumentError, match=r"^root=s3://bucket: remote folders are not searched"):
        find_layout(Url("s3://bucket"), "voc")


def test_shapes_are_rendered_into_local_folders_only():
    with pytest.raises(ArgumentError, match=r"^root=s3://bucket/shapes: must be a local folder"):
        ShapesDataModule(root="s3://bucket/shapes")
