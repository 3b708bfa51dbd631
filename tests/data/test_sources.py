"""Which images and videos a source names, and their names in results."""

import errno
import io
import os
import zipfile

import pytest
from PIL import Image

from cpm_rcnn.data import sources
from cpm_rcnn.data.image_files import image_files
from cpm_rcnn.data.sources import find_images, find_sources
from cpm_rcnn.errors import UserError
from cpm_rcnn.remote.urls import Url


def image_bytes(suffix="png"):
    stream = io.BytesIO()
    Image.new("RGB", (4, 3)).save(stream, suffix)
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder with images, a video and a text file, from which relative paths start."""
    for name in (
        "photos/b.jpg",
        "photos/a.PNG",
        "photos/deep/c.tif",
        "photos/d.mp4",
        "photos/note.txt",
        "more/b.jpg",
        "shots [1]/e.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(value):
    return [file.name for file in find_sources(value)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("photos", ["a.PNG", "b.jpg", "d.mp4", "deep/c.tif"]),
        ("photos/b.jpg", ["b.jpg"]),
        ("photos/note.txt", ["note.txt"]),  # whatever its suffix is
        ("photos/*.jpg", ["b.jpg"]),
        ("*/b.jpg", ["more/b.jpg", "photos/b.jpg"]),
        ("[mp]*/**/*.*", ["more/b.jpg", "photos/a.PNG", "photos/b.jpg", "photos/d.mp4", "photos/deep/c.tif"]),
        (["photos/b.jpg", "more/b.jpg"], ["photos/b.jpg", "more/b.jpg"]),
        (["more", "photos/deep"], ["more/b.jpg", "photos/deep/c.tif"]),
        (["photos/b.jpg", "./photos/../photos/*.jpg"], ["b.jpg"]),  # each once
        ("https://host/x/a.jpg?key=1", ["a.jpg"]),
        (["https://host/x/a.jpg", "https://host/y/a.jpg"], ["x/a.jpg", "y/a.jpg"]),
        (["https://host/image?id=1", "https://host/image?id=2"], ["image", "image_2"]),
        (["https://host/a.jpg", "s3://host/../b.mp4"], ["a.jpg", "b.mp4"]),
        (["more/b.jpg", "https://host/b.jpg"], ["b.jpg", "b_2.jpg"]),
        ("shots [1]/*.jpg", ["e.jpg"]),  # the folder of this name, not shots 1
    ],
)
def test_a_source_names_images_and_videos(photos, value, expected):
    assert names(value) == expected


def test_images_and_videos_are_told_apart_by_their_suffix_and_read_where_they_are(photos):
    found = {file.name: file for file in find_sources("photos")}
    assert [name for name, file in found.items() if file.is_video] == ["d.mp4"]
    assert found["deep/c.tif"].read() == b"photos/deep/c.tif"
    assert found["deep/c.tif"].label == os.path.join("photos", "deep", "c.tif")


def test_the_images_of_an_archive_are_named_by_their_members_without_leaving_a_folder(photos):
    with zipfile.ZipFile(photos / "a.zip", "w") as archive:
        for name in ("x/1.jpg", "x/", "../../2.jpg", "/y/5.jpg", "__MACOSX/x/1.jpg", "3.txt", "4.mp4"):
            archive.writestr(name, name)
    found = {file.name: file.read() for file in find_sources("a.zip")}
    assert found == {"2.jpg": b"../../2.jpg", "y/5.jpg": b"/y/5.jpg", "x/1.jpg": b"x/1.jpg"}
    assert names(["a.zip", "photos/b.jpg"]) == ["a.zip/2.jpg", "a.zip/y/5.jpg", "a.zip/x/1.jpg", "photos/b.jpg"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere", "source=nowhere: no such file or folder"),
        ("photos/*.gif", r"source=photos/\*\.gif: matches no image or video"),
        (
            "photos/**.jpg",
            r"source=photos/\*\*\.jpg: (Invalid pattern|matches no image)",
        ),  # allowed from Python 3.13 on
        ("empty", "source=empty: no image or video in this folder"),
        ("empty.zip", r"source=empty\.zip: no image in this archive"),
        ("bad.zip", r"bad\.zip: not a readable zip archive"),
        ("ftp://host/a.jpg", "source=ftp://host/a.jpg: must be a local path or start with s3://"),
        ("s3://bucket/photos", "source=s3://bucket/photos: must be an image, a video or a .zip, by its suffix"),
        ([], r"source=\[\]: must have"),
        (["photos", None], "source=null: must be a path"),
        (["photos", ""], "source=: must be a path"),
        (True, "source=true: must be a path"),
    ],
)
def test_what_names_no_image_is_refused_in_one_line(photos, value, message):
    (photos / "empty").mkdir()
    (photos / "bad.zip").write_bytes(b"text")
    zipfile.ZipFile(photos / "empty.zip", "w").close()
    with pytest.raises(UserError, match=message):
        find_sources(value)


def test_a_folder_that_cannot_be_listed_is_named(photos, monkeypatch):
    scandir = os.scandir

    def refuse(folder):
        if os.path.basename(folder) == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"photos/deep: this folder cannot be listed \(Permission denied\)"):
        find_sources("photos")


def test_a_remote_folder_is_not_listed():
    with pytest.raises(UserError, match="s3://bucket/photos: remote folders are not listed"):
        image_files(Url("s3://bucket/photos")).names()


def test_without_the_package_for_videos_a_video_is_refused_with_what_to_install(photos, monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"d\.mp4: videos need the package av: pip install 'cpm-rcnn\[video\]'"):
        find_sources("photos")
    assert names("photos/*.jpg") == ["b.jpg"]


def test_images_alone_can_be_asked_for(photos):
    folder, found = find_images(photos / "photos")
    assert (folder, found) == (photos / "photos", ["a.PNG", "b.jpg", "deep/c.tif"])
