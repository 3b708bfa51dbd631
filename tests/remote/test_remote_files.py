import multiprocessing
import pickle
import time

import pytest
import torch
from safetensors.torch import save_file

from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.remote.files import local_copy, local_file, read
from cpm_rcnn.remote.urls import Url
from cpm_rcnn.weights.reading import read_weights


@pytest.fixture
def file(http):
    """A file of a server by http."""
    http.files["/a.jpg"] = b"first"
    return Url(f"{http.url}/a.jpg")


def test_a_file_is_transferred_once_and_compared_once_per_run(http, file):
    start = time.time()
    assert [read(file, start) for _ in range(3)] == [b"first"] * 3
    assert (len(http.asked("HEAD")), len(http.asked("GET"))) == (1, 1)
    assert [read(file, time.time()) for _ in range(2)] == [b"first"] * 2
    assert (len(http.asked("HEAD")), len(http.asked("GET"))) == (3, 1)


def test_a_changed_file_is_read_anew_by_the_next_run_not_within_one(http, file):
    start = time.time()
    assert read(file, start) == b"first"
    http.files["/a.jpg"] = b"other"
    assert read(file, start) == b"first"
    assert read(file, time.time()) == b"other"
    assert local_copy(file).read_bytes() == b"other"
    http.files["/a.jpg"] = b"third"
    assert local_copy(file).read_bytes() == b"third"


def _copy(url, queue):
    queue.put(local_copy(url).read_bytes())


def test_processes_that_need_the_same_file_download_it_once(http, file):
    http.files["/a.jpg"] = bytes(10**6)
    local_copy(Url(f"{http.url}/a.jpg?other"))  # forked processes must not use this process's connections
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_copy, args=(file, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [bytes(10**6)] * 3
    for process in processes:
        process.join()
    assert len(http.asked("GET")) == 2


def test_a_file_larger_than_the_cache_is_refused_as_a_copy_but_can_be_read(http, file, monkeypatch):
    monkeypatch.setenv("CPM_RCNN_CACHE_GB", "0.000001")
    http.files["/a.jpg"] = bytes(2000)
    with pytest.raises(UserError, match=r"/a.jpg: has 2e-06 GB, more than the cache may have; raise CPM_RCNN_CACHE_GB"):
        local_copy(file)
    assert read(file, 0) == bytes(2000)


def test_a_cache_that_cannot_be_written_is_named(http, file, cache, caplog):
    cache.write_text("a file, not a folder")
    assert [read(file, 0) for _ in range(2)] == [b"first"] * 2
    (record,) = caplog.records
    assert f"the cache {cache} cannot be written (" in record.getMessage()
    with pytest.raises(UserError, match=rf"/a.jpg: the cache {cache} cannot be written .*; set CPM_RCNN_CACHE to"):
        local_copy(file)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_weights_are_read_by_url_in_every_format(http, suffix, tmp_path):
    state = {"weight": torch.arange(6.0)}
    file = tmp_path / "weights"
    if suffix == "pth":
        torch.save(state, file)
    elif suffix == "safetensors":
        save_file(state, file)
    else:
        file.write_bytes(pickle.dumps({name: value.numpy() for name, value in state.items()}))
    http.files[f"/w.{suffix}"] = file.read_bytes()
    assert torch.equal(read_weights(f"{http.url}/w.{suffix}?key=1", "init")["weight"], state["weight"])


def test_a_file_can_be_local_or_remote(http, file, tmp_path):
    path = tmp_path / "b"
    path.write_bytes(b"local")
    assert local_file("ckpt", path) == path
    assert local_file("ckpt", file.text).read_bytes() == b"first"
    with pytest.raises(ArgumentError, match=r"^ckpt=ftp://a/b: must be a local path or start with s3"):
        local_file("ckpt", "ftp://a/b")
