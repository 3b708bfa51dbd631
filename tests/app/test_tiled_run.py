"""``data.tile``: training, evaluation and prediction with tiles."""

import json

import pytest
from runs import last_checkpoint, metrics, refused, same_run
from small_run import SMALL

import cpm_rcnn

RUN = [
    *SMALL,
    *("data.tile=128", "data.negatives=0.2", "augment=standard", "sheet_images=1"),
    *("schedule.epochs=0.25", "detector.proposals_train=auto"),
]


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.fixture
def run(command, runs):
    """The folder of an uninterrupted run with tiles."""
    if not runs:
        answer = command("train", *RUN, "name=tiled")
        assert answer.status == 0, answer.err
        runs["tiled"] = answer
    return runs["tiled"].folder


def test_a_run_with_tiles_resumes_to_the_same_weights_with_other_workers(command, run):
    parts = [*RUN, "name=tiled_parts", "sheet_images=0"]
    assert command("train", *parts, "schedule.epochs=0.01", "data.num_workers=1").status == 0
    resumed = command("train", *parts, "resume=auto", "data.num_workers=2")
    assert resumed.status == 0, resumed.err
    assert same_run(last_checkpoint(resumed.folder), last_checkpoint(run))


def test_a_run_does_not_resume_with_other_tiles(command, run):
    for change in ("data.tile=96", "data.tile_overlap=0.5"):
        assert change.partition("=")[0] in refused(command("train", *RUN, change, "name=tiled", "resume=auto"))


def test_an_evaluation_uses_the_tiles_of_the_checkpoint_and_detects_in_whole_images(command, run, workplace):
    evaluated = command("eval", f"ckpt={run}", "trainer=cpu", "name=eval_tiled")
    assert evaluated.status == 0, evaluated.err
    found = metrics(run)
    assert metrics(evaluated.folder) == {name: found[name] for name in metrics(evaluated.folder)}
    detections = json.loads((evaluated.folder / "detections.json").read_text())
    assert max(row["bbox"][0] + row["bbox"][2] for row in detections) > 160
    content = json.loads((workplace / "data/shapes/annotations/instances_val.json").read_text())
    detector = cpm_rcnn.load(run / "checkpoints/best.ckpt")
    assert (detector.tile, detector.tile_overlap) == (128, 0.2)
    for image in content["images"]:
        (expected,) = detector.detect([workplace / "data/shapes/val" / image["file_name"]])
        scores = sorted(row["score"] for row in detections if row["image_id"] == image["id"])
        assert scores == pytest.approx(sorted(expected.scores.tolist()), abs=1e-5)

    whole = command("eval", f"ckpt={run}", "trainer=cpu", "data.tile=null", "name=eval_whole")
    assert whole.status == 0, whole.err
    assert json.loads((whole.folder / "detections.json").read_text()) != detections


def test_predict_says_which_tiles_it_uses_and_can_use_others(command, run, workplace):
    source = next((workplace / "data/shapes/val").glob("*.jpg"))
    for tiles, line in (
        ({}, "tiles of 128 pixels with an overlap of 0.2;"),
        ({"tile": 96, "tile_overlap": 0.0}, "tiles of 96 pixels with an overlap of 0;"),
        ({"tile": None}, None),
    ):
        options = [f"data.{name}={'null' if value is None else value}" for name, value in tiles.items()]
        answer = command("predict", f"ckpt={run}", f"source={source}", "name=drawn", *options)
        assert answer.status == 0, answer.err
        printed = [printed for printed in answer.out.splitlines() if printed.startswith("tiles of")]
        assert [text.startswith(str(line)) for text in printed] == [True] * (line is not None)
        (expected,) = cpm_rcnn.load(run / "checkpoints/best.ckpt", **tiles).detect([source])
        rows = json.loads((answer.folder / "detections.json").read_text())
        assert [row["score"] for row in rows] == pytest.approx(expected.scores.tolist(), abs=1e-5)


def test_epochs_and_choices_count_tiles(run, runs):
    line = next(line for line in runs["tiled"].out.splitlines() if line.startswith("schedule.epochs="))
    tiles, steps = line.split(" epochs of ")[1].split(" tiles are ")
    assert int(tiles) > 6
    assert f"chosen for {tiles} training tiles and 1 CPU" in runs["tiled"].out
    assert int(steps.split(" steps")[0]) == -(-int(tiles) // 8) > 2


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("data.tile=10", "data.tile=10: must be an integer, at least 64"),
        ("data.tile_overlap=0.9", "data.tile_overlap=0.9: must be below 0.9"),
    ],
)
def test_invalid_tiles_are_refused_in_one_line(command, run, option, line):
    assert refused(command("train", *SMALL, option)).startswith(f"error: {line}")
    assert refused(command("eval", f"ckpt={run}", "trainer=cpu", option)).startswith(f"error: {line}")
    assert refused(command("predict", f"ckpt={run}", f"source={run}", option)).startswith(f"error: {line}")
