import multiprocessing
import os
import time

import pytest

from cpm_rcnn.errors import UserError
from cpm_rcnn.remote.cache import Cache


@pytest.fixture
def small(cache):
    return Cache(cache, 1000)


def entries(cache: Cache) -> list:
    return [path for path in cache.folder.glob("???/*") if path.is_file()]


def test_what_was_stored_is_found_by_key_and_version(small):
    path = small.store("a", "1", [b"one", b"two"])
    assert path.read_bytes() == b"onetwo"
    assert small.find("a", "1") == small.find("a") == path
    assert small.find("a", "2") is None
    assert small.find("b", "1") is None


def test_a_new_version_takes_the_place_of_the_old_one(small):
    small.store("a", "1", [b"old"])
    small.store("a", "2", [b"new"])
    assert [path.read_bytes() for path in entries(small)] == [b"new"]


def test_the_least_recently_used_files_are_removed_when_the_limit_is_reached(small):
    for name in "abcd":
        small.store(name, "1", [bytes(240)])
    assert small.find("a", "1")
    small.store("e", "1", [bytes(240)])
    assert [name for name in "abcde" if small.find(name, "1")] == ["a", "d", "e"]
    assert sum(path.stat().st_size for path in entries(small)) <= 1000


def test_a_file_that_lacks_bytes_is_not_used(small):
    path = small.store("a", "1", [b"content"])
    path.write_bytes(b"cont")
    assert small.find("a", "1") is None


def test_a_failed_transfer_leaves_nothing(small):
    def parts():
        yield b"first"
        raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        small.store("a", "1", parts())
    assert entries(small) == []


def test_files_of_killed_processes_are_removed_when_room_is_needed(small):
    folder = small.store("a", "1", [bytes(900)]).parent
    old, new = folder / "old.part", folder / "new.part"
    for path in (old, new):
        path.write_bytes(b"unfinished")
    os.utime(old, (0, 0))
    small.store("b", "1", [bytes(900)])
    assert (old.exists(), new.exists()) == (False, True)


def test_a_comparison_with_the_original_counts_from_when_it_was_made(small):
    before = time.time()
    small.store("a", "1", [b"content"])
    assert small.find("a", checked_since=before)
    after = time.time()
    assert small.find("a")  # a use is not a comparison
    assert small.find("a", checked_since=after) is None
    assert small.find("a", "1")
    assert small.find("a", checked_since=after)


def _fill(folder, name):
    cache = Cache(folder, 10_000)
    for number in range(60):
        cache.store(f"{name}{number}", "1", [bytes(100 + number)])
        found = cache.find(f"{name}{number}", "1")
        assert found is None or len(found.read_bytes()) == 100 + number


def test_processes_share_a_cache_within_its_limit(cache):
    processes = [multiprocessing.get_context("fork").Process(target=_fill, args=(cache, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    sizes = [path.stat().st_size for path in entries(Cache(cache, 10_000))]
    assert 6_000 < sum(sizes) <= 10_000


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "many"])
def test_an_invalid_limit_is_refused_by_the_name_of_its_variable(limit, monkeypatch):
    monkeypatch.setenv("CPM_RCNN_CACHE_GB", limit)
    with pytest.raises(UserError, match=rf"^CPM_RCNN_CACHE_GB={limit}: must be a number above 0, in GB$"):
        Cache.from_environment()


def test_the_folder_and_limit_have_defaults(monkeypatch):
    monkeypatch.delenv("CPM_RCNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    cache = Cache.from_environment()
    assert (str(cache.folder), cache.limit) == ("/somewhere/cpm_rcnn", 20_000_000_000)
