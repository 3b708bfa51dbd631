"""Reading images and videos one after the other, and going on after those that cannot be read."""

import io
import logging
import os
import zipfile

import pytest
from PIL import Image

from cpm_rcnn.data.source_reader import SourceReader
from cpm_rcnn.data.sources import find_sources
from cpm_rcnn.errors import UnavailableError, UserError
from video_files import write_video


def png(gray):
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (gray,) * 3).save(stream, "png")
    return stream.getvalue()


def read(value, stride=1):
    reader = SourceReader(find_sources(value), stride)
    return reader, list(reader)


def test_images_behind_urls_are_read_again_after_a_failure_of_the_server(http):
    http.files = {"/a.png": png(7), "/b.png": png(9)}
    http.faults = {"/a.png": [503, "truncate"]}
    reader, images = read([f"{http.url}/a.png", f"{http.url}/b.png"])
    assert [(image.id, image.name, image.pixels[0, 0, 0].item()) for image in images] == [
        (1, "a.png", 7),
        (2, "b.png", 9),
    ]
    assert (reader.images, reader.skipped, reader.total) == (2, 0, 2)


def test_of_several_urls_those_that_cannot_be_read_are_reported_and_skipped(http, caplog):
    http.files = {"/a.png": png(7), "/down.png": png(8), "/text.png": b"text", "/z.png": png(9)}
    http.faults = {"/down.png": [500] * 9}
    urls = [f"{http.url}/{name}.png" for name in ("a", "down", "none", "text", "z")]
    with caplog.at_level(logging.WARNING):
        reader, images = read(urls)
    assert [(image.id, image.name) for image in images] == [(1, "a.png"), (5, "z.png")]
    assert (reader.skipped, reader.position, reader.total) == (3, 5, 5)
    down, none, text = caplog.messages
    assert down == f"{urls[1]}: cannot be read after 4 attempts (HTTP status 500); skipped"
    assert none == f"{urls[2]}: no such file; skipped"
    assert text.startswith(f"{urls[3]} is damaged or not an image")


@pytest.mark.parametrize(("fault", "kind"), [("none", UserError), ("down", UnavailableError)])
def test_one_url_that_cannot_be_read_is_an_error(http, fault, kind):
    http.files = {"/down.png": png(8)}
    http.faults = {"/down.png": [500] * 9}
    with pytest.raises(kind, match=f"{fault}.png"):
        read(f"{http.url}/{fault}.png")


def test_a_remote_archive_and_a_remote_video_are_read(http, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/1.png", png(3))
    video = write_video(tmp_path / "v.mp4", 3)
    http.files = {"/a.zip": (tmp_path / "a.zip").read_bytes(), "/v.mp4": video.read_bytes()}
    http.files["/B.ZIP"] = http.files["/a.zip"]
    _, images = read([f"{http.url}/{name}" for name in ("a.zip", "B.ZIP", "v.mp4")])
    frames = ["v.mp4/000000", "v.mp4/000001", "v.mp4/000002"]
    assert [image.name for image in images] == ["a.zip/x/1.png", "B.ZIP/x/1.png", *frames]
    assert images[0].pixels[0, 0, 0] == 3


def test_images_and_frames_are_numbered_and_the_total_is_known_when_a_video_is_opened(tmp_path):
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(png(5))
    write_video(tmp_path / "b.mp4", 7)
    reader = SourceReader(find_sources(str(tmp_path)), video_stride=3)
    assert reader.total == 3
    seen = [(image.id, image.name, reader.total) for image in reader]
    assert seen == [
        (1, "a.png", 3),
        (2, "b.mp4/000000", 5),
        (3, "b.mp4/000003", 5),
        (4, "b.mp4/000006", 5),
        (5, "c.png", 5),
    ]
    assert (reader.images, reader.frames, reader.skipped) == (2, 3, 0)


def test_the_frames_of_a_damaged_video_are_used_and_the_total_is_corrected(tmp_path, caplog):
    video = write_video(tmp_path / "a.mp4", 50, noise=100, options={"movflags": "faststart"})
    video.write_bytes(video.read_bytes()[: video.stat().st_size * 6 // 10])
    reader, images = read(str(video))
    assert 20 < len(images) == reader.frames == reader.total < 35
    assert reader.skipped == 1
    (message,) = caplog.messages
    assert message.startswith(str(video))
    assert message.endswith("; the frames before are used")


def test_one_video_of_which_nothing_can_be_read_is_an_error(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"text")
    with pytest.raises(UserError, match=r"a\.mp4 is damaged or not a video"):
        read(str(tmp_path / "a.mp4"))


def test_a_name_that_is_not_utf_8_can_be_printed(tmp_path):
    name = os.fsdecode(b"\xff.png")
    try:
        (tmp_path / name).write_bytes(b"text")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(UserError, match=r"/\\udcff\.png is damaged"):
        read(str(tmp_path))


def test_a_link_without_its_target_is_reported(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(png(5))
    (tmp_path / "b.png").symlink_to("gone.png")
    for source in (tmp_path, tmp_path / "*.png"):
        caplog.clear()
        reader, images = read(str(source))
        assert ([image.name for image in images], reader.skipped) == (["a.png"], 1)
        assert caplog.messages == [f"{tmp_path}: image b.png not found; skipped"]
