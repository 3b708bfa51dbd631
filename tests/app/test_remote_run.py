"""Commands on remote data and checkpoints, on an S3 server on loopback."""

import json

import pytest
from runs import last_checkpoint, metrics, refused, same_run
from small_run import SMALL

from cpm_rcnn.data.shapes import write_shapes
from remote_servers import CREDENTIALS, be_quick, s3_server, upload

NAMES = [
    *("data=custom", "data.train_json=annotations/instances_train.json", "data.train_images=train"),
    *("data.val_json=annotations/instances_val.json", "data.val_images=val"),
]
RUN = [*(argument for argument in SMALL if not argument.endswith(("count=6", "count=5"))), *NAMES, "sheet_images=0"]


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server.url, "CPM_RCNN_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    be_quick(monkeypatch)
    server.faults.clear()
    return server


@pytest.fixture(scope="module")
def shapes(workplace, server):
    """A local data set and its copy in the bucket ``shapes``."""
    root = workplace / "local_shapes"
    write_shapes(root, 6, 3)
    upload(server, "shapes", {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")})
    return root


def test_a_run_on_remote_data_resumes_from_a_remote_checkpoint_and_ends_like_one_on_local_files(command, s3, shapes):
    local = command("train", *RUN, f"data.root={shapes}", "name=local")
    assert local.status == 0, local.err
    started = command("train", *RUN, "data.root=s3://shapes", "schedule.max_steps=2", "name=remote")
    assert started.status == 0, started.err
    upload(s3, "runs", {"last.ckpt": (started.folder / "checkpoints/last.ckpt").read_bytes()})
    s3.faults["/runs/last.ckpt"] = [500, "truncate"]
    arguments = ("data.root=s3://shapes", "data.num_workers=2", "resume=s3://runs/last.ckpt", "name=resumed")
    resumed = command("train", *RUN, *arguments)
    assert resumed.status == 0, resumed.err
    assert same_run(last_checkpoint(resumed.folder), last_checkpoint(local.folder))

    upload(s3, "runs", {"best.ckpt": (resumed.folder / "checkpoints/best.ckpt").read_bytes()})
    own = ("split=s3://shapes/annotations/instances_val.json", "images=s3://shapes/val")
    evaluated = command("eval", "ckpt=s3://runs/best.ckpt", "trainer=cpu", *own, "name=remote_eval")
    assert evaluated.status == 0, evaluated.err
    assert metrics(evaluated.folder)["AP"] == metrics(resumed.folder)["best"]["AP"]
    # A copy, so that compare needs no server.
    assert json.loads((evaluated.folder / "evaluated.json").read_text())["annotations"] == "annotations.json"
    assert (evaluated.folder / "annotations.json").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("eval", ["ckpt=s3://runs/none.ckpt"], "error: s3://runs/none.ckpt: no such file"),
        ("eval", ["ckpt=ftp://runs/none.ckpt"], "error: ckpt=ftp://runs/none.ckpt: must be a local path or start with"),
        ("train", [*RUN, "data.root=s3://none"], "error: s3://none/annotations/instances_train.json: no such file"),
        ("train", [*RUN, "data.root=ftp://none"], "error: data.root=ftp://none: must be a local path or start with"),
        (
            "train",
            ["data=custom", "data.root=s3://shapes"],
            "error: data.root=s3://shapes: remote folders are not searched for data sets; name the COCO-style jsons "
            "and the images of the splits, data.train_json=FILE.json",
        ),
        ("train", [*RUN, "resume=s3://runs/none.ckpt"], "error: s3://runs/none.ckpt: no such file"),
        (
            "train",
            [*RUN, "data.root=s3://shapes", "init=s3://runs/none.ckpt"],
            "error: s3://runs/none.ckpt: no such file",
        ),
        ("train", ["name=s3://runs/new"], "error: name=s3://runs/new: the folder of a run must be local"),
        (
            "predict",
            ["ckpt=s3://runs/none.ckpt", "source=s3://shapes/val"],
            "error: source=s3://shapes/val: must be an image, a video or a .zip, by its suffix; remote folders are not",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(command, s3, shapes, name, arguments, line):
    assert refused(command(name, *(["trainer=cpu"] if name != "predict" else []), *arguments)).startswith(line)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_stays_down_ends_a_run_in_one_line(command, s3, shapes, workers):
    image = json.loads((shapes / "annotations/instances_train.json").read_text())["images"][-1]["file_name"]
    s3.faults[f"/shapes/train/{image}"] = [503] * 99
    arguments = ("data.root=s3://shapes", "data.on_error=skip", f"data.num_workers={workers}", "name=down")
    line = refused(command("train", *RUN, *arguments))
    assert line == f"error: s3://shapes/train/{image}: cannot be read after 4 attempts (HTTP status 503)"
