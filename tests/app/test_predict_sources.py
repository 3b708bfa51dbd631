"""``predict`` on URLs, videos and lists, and with the multi-scale test."""

import csv
import io
import json
import logging
import signal
import sys

import av
import pytest
from runs import refused

import cpm_rcnn
from cpm_rcnn.commands.predict import logging_above_bar
from cpm_rcnn.inference import Detector, MultiScaleSettings
from video_files import write_video

OPTIONS = ("device=cpu", "detector.score_threshold=0.01", "min_score=0.018")


@pytest.fixture
def images(checkpoint, workplace):
    """Two images."""
    return [workplace / f"data/shapes/val/00000{number}.jpg" for number in (1, 2)]


def test_predict_finds_the_same_in_images_behind_urls_and_skips_what_a_server_does_not_send(
    command, checkpoint, http, images
):
    http.files = {f"/x/{path.name}": path.read_bytes() for path in images}
    local = command("predict", f"ckpt={checkpoint}", f"source=[{images[0]},{images[1]}]", *OPTIONS, "name=local")
    urls = [f"{http.url}/x/{images[0].name}", f"{http.url}/none.jpg", f"{http.url}/x/{images[1].name}"]
    answer = command("predict", f"ckpt={checkpoint}", f"source=[{','.join(urls)}]", *OPTIONS, "name=remote")
    assert (local.status, answer.status) == (0, 1), answer.err
    assert answer.err.splitlines()[-1] == "error: 1 of 3 files could not be read completely, see above"
    assert f"{urls[1]}: no such file; skipped" in answer.out + answer.err
    results = [json.loads((each.folder / "detections.json").read_text()) for each in (local, answer)]
    assert [row["file_name"].removeprefix("x/") for row in results[1]] == [row["file_name"] for row in results[0]]
    assert [row["bbox"] for row in results[1]] == [row["bbox"] for row in results[0]]
    assert {path.name for path in (answer.folder / "images/x").iterdir()} == {f"{path.name}.png" for path in images}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("none.jpg", "error: {url}/none.jpg: no such file"),
        ("text.jpg", "error: {url}/text.jpg is damaged or not an image in a supported format"),
        ("down.jpg", "error: {url}/down.jpg: cannot be read after 4 attempts (HTTP status 503)"),
        ("none.zip", "error: {url}/none.zip: no such file"),
    ],
)
def test_one_url_that_cannot_be_read_is_refused_in_one_line(command, checkpoint, http, path, line):
    http.files = {"/text.jpg": b"text", "/down.jpg": b"pixels"}
    http.faults = {"/down.jpg": [503] * 9}
    answer = command("predict", f"ckpt={checkpoint}", f"source={http.url}/{path}", "device=cpu")
    assert refused(answer).startswith(line.format(url=http.url))


def test_predict_writes_an_annotated_video_and_the_detections_of_its_frames(command, checkpoint, tmp_path):
    video = write_video(tmp_path / "a.mov", 9, size=(480, 640))
    kinds = "output=[pictures,coco,csv,yolo,crops]"
    options = (f"source={video}", *OPTIONS, "video_stride=4", "batch_size=2", kinds)
    answer = command("predict", f"ckpt={checkpoint}", *options)
    assert answer.status == 0, answer.err
    assert "3 video frames, " in answer.out
    with av.open(str(answer.folder / "videos/a.mov.mp4")) as container:
        assert [frame.time for frame in container.decode(video=0)] == [0, 4 / 25, 8 / 25]
        assert (container.streams.video[0].width, container.streams.video[0].height) == (640, 480)
    found = json.loads((answer.folder / "detections.json").read_text())
    assert {(row["image_id"], row["file_name"], row["frame"], row["seconds"]) for row in found} == {
        (1, "a.mov/000000", 0, 0.0),
        (2, "a.mov/000004", 4, 0.16),
        (3, "a.mov/000008", 8, 0.32),
    }
    shown = [row for row in found if row["score"] >= 0.018]
    with (answer.folder / "detections.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(shown) > 0
    assert [(row["file_name"], int(row["frame"])) for row in table] == [(r["file_name"], r["frame"]) for r in shown]
    assert sorted(path.name for path in (answer.folder / "labels/a.mov").iterdir()) == [
        "000000.txt",
        "000004.txt",
        "000008.txt",
    ]
    assert len(list((answer.folder / "crops").rglob("a.mov/*.png"))) == len(shown)


def test_predict_keeps_what_it_found_before_the_damage_of_a_video(command, checkpoint, tmp_path):
    video = write_video(tmp_path / "a.mp4", 50, noise=100, options={"movflags": "faststart"})
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 6 // 10])
    answer = command("predict", f"ckpt={checkpoint}", f"source={video}", "video_stride=10", *OPTIONS)
    assert answer.status == 1
    assert answer.err.splitlines()[-1] == "error: 1 of 1 file could not be read completely, see above"
    assert (answer.out + answer.err).count("; the frames before are used") == 1
    with av.open(str(answer.folder / "videos/a.mp4.mp4")) as container:
        assert [frame.time for frame in container.decode(video=0)] == [0, 0.4, 0.8]
    assert {row["frame"] for row in json.loads((answer.folder / "detections.json").read_text())} == {0, 10, 20}


def test_a_video_stride_below_1_is_refused(command, checkpoint, images):
    line = refused(command("predict", f"ckpt={checkpoint}", f"source={images[0]}", "video_stride=0"))
    assert line == "error: video_stride=0: must be an integer, at least 1"


def test_predict_can_use_the_multi_scale_test(command, checkpoint, images):
    scales = ("multi_scale=on", "multi_scale.scales=[0.75,1.0]", "multi_scale.flip=false")
    answer = command("predict", f"ckpt={checkpoint}", f"source={images[0]}", *OPTIONS, *scales)
    assert answer.status == 0, answer.err
    settings = MultiScaleSettings(scales=(0.75, 1.0), flip=False)
    (expected,) = cpm_rcnn.load(checkpoint, score_threshold=0.01, multi_scale=settings).detect([images[0]])
    rows = json.loads((answer.folder / "detections.json").read_text())
    assert [row["score"] for row in rows] == pytest.approx(expected.scores.tolist(), abs=1e-5)
    assert len(rows) > 0


def test_messages_are_written_where_the_progress_bar_expects_them(monkeypatch):
    original, replaced = io.StringIO(), io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(original)])
    monkeypatch.setattr(sys, "stdout", replaced)
    with logging_above_bar():
        logging.getLogger().warning("during")
    logging.getLogger().warning("after")
    assert (replaced.getvalue(), original.getvalue()) == ("during\n", "after\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_predict_finishes_its_files_when_a_signal_stops_it(command, checkpoint, tmp_path, images, monkeypatch, number):
    video = write_video(tmp_path / "a.mp4", 6)
    detect, calls = Detector.detect, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            if number == signal.SIGINT:
                raise KeyboardInterrupt  # a job in the background may ignore the signal
            signal.raise_signal(number)
        return detect(self, *arguments, **options)

    monkeypatch.setattr(Detector, "detect", interrupted)
    answer = command("predict", f"ckpt={checkpoint}", f"source={video}", *OPTIONS, f"name=stopped_{number}")
    assert answer.status == 128 + number
    assert f"stopped by {number.name}" in answer.err
    folder = images[0].parents[3] / f"outputs/stopped_{number}"
    with av.open(str(folder / "videos/a.mp4.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3
    assert {row["frame"] for row in json.loads((folder / "detections.json").read_text())} == {0, 1, 2}
