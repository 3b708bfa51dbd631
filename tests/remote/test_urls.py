import pickle
from pathlib import Path

import pytest

from cpm_rcnn.data import DataSettings
from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.remote.urls import Url, join, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/a.json", "https://host/a.json"),
        ("GET https://host/a.json?X-Amz-Signature=secret failed", "GET https://host/a.json failed"),
        ("404, url='http://host/a?b=secret'", "404, url='http://host/a'"),
        ("ckpt=https://host/a.ckpt?token=secret: no such file", "ckpt=https://host/a.ckpt no such file"),
        ("s3://bucket/what?.jpg", "s3://bucket/what?.jpg"),
        ("mail me@host, is it a?b", "mail me@host, is it a?b"),
    ],
)
def test_messages_have_no_passwords_and_no_queries_of_urls(text, shown):
    assert without_secrets(text) == shown


def test_a_url_prints_without_secrets_but_keeps_them_also_when_pickled():
    url = Url("https://me:secret@host/a.json?b=secret")
    assert "secret" not in f"{url}{url!r}"
    assert pickle.loads(pickle.dumps(url)).text == "https://me:secret@host/a.json?b=secret"
    assert (url.name, url.stem, url.suffix) == ("a.json", "a", ".json")


def test_names_in_a_folder_are_quoted_for_http_and_keep_its_query():
    assert (Url("http://host/data/?key=1") / "a b/100%#.jpg").text == "http://host/data/a%20b/100%25%23.jpg?key=1"
    assert (Url("s3://bucket/data") / "a b/100%#.jpg").text == "s3://bucket/data/a b/100%#.jpg"


def test_local_and_remote_places_can_be_mixed():
    assert join(Path("/data"), "s3://bucket/a.json") == Url("s3://bucket/a.json")
    assert join(Url("s3://bucket"), "/data/a.json") == Path("/data/a.json")
    assert join(Url("s3://bucket"), "a.json") == Url("s3://bucket/a.json")


def test_a_scheme_that_is_not_supported_is_refused_with_the_supported_ones():
    with pytest.raises(ArgumentError, match=r"^train_json=ftp://host/a: must be a local path or start with s3://, gs:"):
        DataSettings(train_json="ftp://me:secret@host/a")
