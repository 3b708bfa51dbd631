import logging
import sys

import pytest

from cpm_rcnn.errors import UnavailableError, UserError
from cpm_rcnn.remote import transfer
from cpm_rcnn.remote.transfer import MissingError, describe, download
from cpm_rcnn.remote.urls import Url
from remote_servers import STALL, upload

CONTENT = bytes(range(256)) * 4


def content_of(url: str) -> bytes:
    return b"".join(download(describe(Url(url))))


@pytest.fixture(params=["http", "s3"])
def remote(request):
    """A server, the path of a file on it, and the file's URL."""
    server = request.getfixturevalue(request.param)
    if request.param == "http":
        server.files["/bucket/a.bin"] = CONTENT
        return server, "/bucket/a.bin", f"{server.url}/bucket/a.bin"
    upload(server, "bucket", {"a.bin": CONTENT})
    return server, "/bucket/a.bin", "s3://bucket/a.bin"


@pytest.mark.parametrize("fault", [500, 503, 429, "stall", "truncate", "short"])
def test_failures_are_repeated(remote, fault, monkeypatch):
    server, path, url = remote
    server.faults[path] = [fault, fault]
    if fault == "stall":
        monkeypatch.setattr(transfer, "STALL", STALL / 2)
    assert content_of(url) == CONTENT
    # On a busy machine, an answer can take as long as a stalled one.
    assert len(server.asked("GET", path)) in ((3, 4) if fault == "stall" else (3,))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, r"HTTP status 500"),
        ("stall", r"the server stalled"),
        ("truncate", r"\w+: .+|the server sent 512 of 1024 bytes"),
        ("short", r"the server sent 512 of 1024 bytes|\w+ChecksumError: .+"),
    ],
)
def test_a_server_that_keeps_failing_gives_one_line(remote, fault, reason, monkeypatch):
    server, path, url = remote
    if fault == "stall":
        monkeypatch.setattr(transfer, "STALL", STALL / 2)
    server.faults[path] = [fault] * 9
    with pytest.raises(UnavailableError, match=rf"^{url}: cannot be read after 4 attempts \(({reason})\)$") as error:
        content_of(url)
    assert "\n" not in str(error.value)
    assert len(server.asked("GET", path)) == 4


def test_a_missing_file_is_reported_without_repetition(remote):
    server, path, url = remote
    with pytest.raises(MissingError, match=rf"^{url}x: no such file$"):
        content_of(f"{url}x")
    assert len(server.asked("HEAD", f"{path}x")) == 1


def test_a_refusal_is_reported_without_repetition(remote):
    server, path, url = remote
    server.faults[path] = [403] * 9
    with pytest.raises(UnavailableError, match=rf"^{url}: access denied \(HTTP status 403\); check the credentials$"):
        content_of(url)
    assert len(server.asked("GET", path)) == 1


def test_other_refusals_are_not_repeated(http):
    http.files["/a"] = CONTENT
    http.faults["/a"] = [400] * 9
    with pytest.raises(UnavailableError, match=r"/a: cannot be read \(HTTP status 400\)$"):
        content_of(f"{http.url}/a")


def test_a_server_that_cannot_be_reached_gives_one_line_without_the_query():
    with pytest.raises(UnavailableError, match=r"^http://127.0.0.1:9/a: cannot be read after 4 attempts \(Client") as e:
        content_of("http://127.0.0.1:9/a?signature=secret")
    assert "secret" not in str(e.value)


def test_missing_credentials_are_named(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"^s3://private/a: access denied \(.*redentials.*\); check the cred"):
        content_of("s3://private/a")


def test_a_large_file_is_read_in_parts_and_only_a_failed_part_again(remote, monkeypatch):
    server, path, url = remote
    monkeypatch.setattr(transfer, "PART", 400)
    server.faults[path] = ["truncate"]
    assert content_of(url) == CONTENT
    assert server.asked("GET", path) == ["bytes=0-399", "bytes=0-399", "bytes=400-799", "bytes=800-1023"]


def test_a_large_file_is_read_at_once_from_a_server_that_sends_no_parts(http, monkeypatch):
    monkeypatch.setattr(transfer, "PART", 400)
    http.files["/a"] = CONTENT
    http.ranges = False
    assert content_of(f"{http.url}/a") == CONTENT
    assert len(http.asked("GET")) == 1


def test_a_file_of_unknown_size_is_read(http):
    http.files["/a"] = CONTENT
    http.lengths = False
    assert describe(Url(f"{http.url}/a")).size is None
    assert content_of(f"{http.url}/a") == CONTENT


def test_an_empty_file_is_read(http):
    http.files["/a"] = b""
    assert content_of(f"{http.url}/a") == b""


def test_a_folder_is_no_file(s3):
    upload(s3, "folders", {"images/a.jpg": CONTENT})
    with pytest.raises(MissingError, match=r"^s3://folders/images: is a folder, not a file$"):
        describe(Url("s3://folders/images"))


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs://b/a: needs gcsfs, which is not installed; pip install gcsfs$"):
        describe(Url("gs://b/a"))


def test_repetitions_are_logged(http, caplog):
    http.files["/a"] = CONTENT
    http.faults["/a"] = [500]
    with caplog.at_level(logging.INFO, logger="cpm_rcnn.remote.transfer"):
        content_of(f"{http.url}/a?b=secret")
    assert [record.getMessage() for record in caplog.records] == [f"{http.url}/a: HTTP status 500; repeated in 0.01 s"]
