import io
import pickle
import random
import zipfile

import pytest

from cpm_rcnn.data import ImageSource
from cpm_rcnn.errors import UserError
from cpm_rcnn.remote import archive as module
from cpm_rcnn.remote.archive import RemoteArchive
from cpm_rcnn.remote.urls import Url
from remote_servers import upload

MEMBERS = {f"images/{number:03}.bin": random.Random(number).randbytes(2000 + number) for number in range(40)}


def zipped(members=MEMBERS, kind=zipfile.ZIP_DEFLATED, comment=b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = comment
    return file.getvalue()


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_members_are_read_by_one_range_each_and_then_from_the_cache(s3, kind):
    upload(s3, "archives", {"a.zip": zipped(kind=kind)})
    archive = RemoteArchive(Url("s3://archives/a.zip"))
    assert archive.names() == list(MEMBERS)
    s3.requests.clear()
    for _ in range(2):
        assert {name: archive.read(name) for name in MEMBERS} == MEMBERS
    assert len(s3.requests) == len(MEMBERS)
    assert all(part.startswith("bytes=") for part in s3.asked("GET"))


@pytest.mark.parametrize(("tail", "requests"), [(100, 3), (2**18, 1)])
def test_the_directory_is_read_in_few_requests(http, monkeypatch, tail, requests):
    monkeypatch.setattr(module, "_TAIL", tail)
    http.files["/a.zip"] = zipped()
    assert RemoteArchive(Url(f"{http.url}/a.zip")).names() == list(MEMBERS)
    assert len(http.asked("GET")) <= requests


def test_an_archive_with_a_comment_is_read(http):
    http.files["/a.zip"] = zipped(comment=b"comment" * 99)
    assert RemoteArchive(Url(f"{http.url}/a.zip")).read("images/007.bin") == MEMBERS["images/007.bin"]


def test_a_pickled_archive_is_not_read_again(http):
    http.files["/a.zip"] = zipped()
    archive = pickle.loads(pickle.dumps(RemoteArchive(Url(f"{http.url}/a.zip"))))
    http.requests.clear()
    assert archive.read("images/000.bin") == MEMBERS["images/000.bin"]
    assert len(http.requests) == 1


def test_a_failing_range_is_repeated(http):
    http.files["/a.zip"] = zipped()
    archive = RemoteArchive(Url(f"{http.url}/a.zip"))
    http.faults["/a.zip"] = ["truncate", 500]
    assert archive.read("images/001.bin") == MEMBERS["images/001.bin"]


def test_a_file_that_is_no_archive_is_refused(http):
    http.files["/a.zip"] = b"no archive" * 99
    with pytest.raises(UserError, match=r"^http.*/a.zip: not a readable zip archive$"):
        RemoteArchive(Url(f"{http.url}/a.zip"))


@pytest.mark.parametrize(
    ("option", "reason"), [("ranges", "does not send parts of files"), ("lengths", "does not say how large")]
)
def test_a_server_that_cannot_serve_archives_is_named(http, monkeypatch, option, reason):
    monkeypatch.setattr(module, "_TAIL", 100)
    http.files["/a.zip"] = zipped()
    setattr(http, option, False)
    with pytest.raises(UserError, match=rf"^http.*/a.zip: the server {reason}"):
        RemoteArchive(Url(f"{http.url}/a.zip"))


def test_damaged_and_encrypted_members_are_named(http):
    content = bytearray(zipped(kind=zipfile.ZIP_STORED))
    content[content.index(MEMBERS["images/003.bin"]) + 5] ^= 1
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)  # of images/001.bin, in the directory
    content[second + 8] |= 1
    http.files["/a.zip"] = bytes(content)
    source = ImageSource(Url(f"{http.url}/a.zip"))
    for name in ("001.bin", "003.bin"):
        with pytest.raises(UserError, match=rf"^http.*/a.zip: {name} cannot be read from the archive$"):
            source.read_bytes(name)
    assert source.read_bytes("002.bin") == MEMBERS["images/002.bin"]
