"""The annotation reader with thousands of mutated files: each loads or is refused with a message of one line."""

import copy
import json
import logging

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.errors import UserError

CONTENT = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "height": 40, "width": 60, "license": 3},
        {"id": 2, "file_name": "b/c.jpg", "height": 60, "width": 40},
        {"id": 5, "file_name": "d.jpg", "height": 50, "width": 50},
    ],
    "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}, {"id": 7, "name": "dog"}],
    "annotations": [
        {"id": 11, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3.5, 4], "area": 14.0, "iscrowd": 0},
        {"id": 12, "image_id": 1, "category_id": 7, "bbox": [10, 20, 30, 10], "segmentation": [[1, 2, 3, 4, 5, 6]]},
        {"id": 13, "image_id": 5, "category_id": 7, "bbox": [0, 0, 50, 50], "iscrowd": 1},
        {"id": 14, "image_id": 2, "category_id": 1, "bbox": [-3, 50, 20, 20.25], "area": 90},
    ],
}
ARRAYS = (
    "image_ids",
    "file_names",
    "offsets",
    "labels",
    "xywh",
    "areas",
    "crowds",
    "usable",
)
KNOWN = [{"id": 1, "name": "cat"}, {"id": 3, "name": "cow"}, {"id": 7, "name": "dog"}]
FUZZ = settings(
    max_examples=1200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2, 5, 7, 11, 12, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 1e15, 1e308, -0.0]),
    st.integers(-100, 100),
    st.floats(),
)
texts = st.one_of(
    st.sampled_from(
        ["", "a.jpg", "../a.jpg", "/a.jpg", "C:\\a.jpg", "a/../../b", "\x00", "\ud800", "a\nb", "é" * 2000]
    ),
    st.text(max_size=8),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.one_of(
    scalars,
    st.lists(numbers, min_size=4, max_size=4),
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from([CONTENT[key][0] for key in CONTENT]).map(copy.deepcopy),
)


def places(node, path=()):
    """All paths into a json, including those of its lists and objects."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw):
    """The small json with one to four changes of its values and structure."""
    content = copy.deepcopy(CONTENT)
    for _ in range(draw(st.integers(1, 4))):
        paths = list(places(content))
        if not paths:
            break
        *path, last = draw(st.sampled_from(paths))
        parent = content
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["put", "put", "put", "drop", "double", "swap"]))
        if action == "put":
            parent[last] = draw(values)
        elif action == "drop":
            del parent[last]
        elif action == "swap":
            other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
            parent[last], parent[other] = parent[other], parent[last]
        elif isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[last]))
        else:
            parent[draw(st.text(max_size=3))] = copy.deepcopy(parent[last])
    return content


@st.composite
def damaged(draw):
    """The bytes of the small json, cut, overwritten, repeated or in another encoding."""
    raw = bytearray(json.dumps(CONTENT).encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "utf-32"]))))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(raw)))
        stop = draw(st.integers(start, min(len(raw), start + 40)))
        action = draw(st.sampled_from(["cut", "overwrite", "insert", "repeat", "end"]))
        if action == "cut":
            del raw[start:stop]
        elif action == "overwrite":
            raw[start:stop] = draw(st.binary(min_size=stop - start, max_size=stop - start))
        elif action == "insert":
            raw[start:start] = draw(
                st.sampled_from([b"NaN", b"-Infinity", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"\\ud800", b"null,"])
                | st.binary(max_size=8)
            )
        elif action == "repeat":
            raw[start:start] = raw[start:stop]
        else:
            del raw[start:]
    return bytes(raw)


@pytest.fixture
def read(tmp_path, caplog):
    """Load bytes with both values of on_error, with and without known categories, and check the result."""
    path = tmp_path / "instances.json"

    def read(raw):
        path.write_bytes(raw)
        for known in (None, KNOWN):
            strict, message = attempt(known, "raise")
            lenient, _ = attempt(known, "skip")
            if strict is not None:
                # Valid files are read in the same way.
                assert lenient is not None
                assert not skipped_entries(lenient, raw)
                for name in ARRAYS:
                    np.testing.assert_array_equal(getattr(strict, name), getattr(lenient, name))
            elif lenient is not None:
                assert skipped_entries(lenient, raw), message

    def attempt(known, on_error):
        caplog.clear()
        try:
            loaded = CocoAnnotations.load(path, known, on_error)
        except UserError as error:
            message = str(error)
            assert message.startswith(f"{path}: ")
            assert len(message.splitlines()) == 1
            assert len(message) < 10_000
            return None, message
        assert all(len(line.splitlines()) == 1 for line in caplog.messages)
        assert len(caplog.messages) <= 1
        assert bool(skipped_entries(loaded, path.read_bytes())) == ("on_error=skip: skipped" in caplog.text)
        consistent(loaded)
        return loaded, None

    with caplog.at_level(logging.WARNING):
        yield read


def skipped_entries(loaded, raw):
    """How many images and annotations of the json ``raw`` were skipped."""
    content = json.loads(raw)
    return len(content["images"]) - len(loaded) + len(content.get("annotations", [])) - len(loaded.labels)


def consistent(loaded):
    images, objects = len(loaded), len(loaded.labels)
    assert images > 0
    assert len(set(loaded.image_ids.tolist())) == images
    for name in ("file_names", "heights", "widths"):
        assert len(getattr(loaded, name)) == images
    for name in ("xywh", "areas", "crowds", "usable"):
        assert len(getattr(loaded, name)) == objects
    assert all(len(name) > 0 for name in loaded.file_names)
    assert (loaded.heights > 0).all()
    assert (loaded.widths > 0).all()
    assert loaded.category_ids == sorted(set(loaded.category_ids))
    assert len(loaded.category_names) == len(loaded.category_ids)
    assert loaded.offsets[0] == 0
    assert loaded.offsets[-1] == objects
    assert (np.diff(loaded.offsets) >= 0).all()
    assert ((loaded.labels >= 1) & (loaded.labels <= len(loaded.category_ids))).all()
    assert np.isfinite(loaded.xywh).all()
    assert (loaded.xywh[:, 2:] >= 0).all()
    assert np.isfinite(loaded.areas).all()
    assert (loaded.areas >= 0).all()
    rows = loaded.image_rows
    x, y, width, height = loaded.xywh[loaded.usable].T
    assert (x < loaded.widths[rows[loaded.usable]]).all()
    assert (y < loaded.heights[rows[loaded.usable]]).all()
    assert ((x + width >= 0) & (y + height >= 0) & (width > 0) & (height > 0)).all()


@FUZZ
@given(mutated())
def test_a_json_with_changed_values_and_structure_loads_or_is_refused_in_one_line(read, content):
    read(json.dumps(content).encode())


@FUZZ
@given(damaged())
def test_a_json_with_damaged_bytes_loads_or_is_refused_in_one_line(read, raw):
    read(raw)


def test_the_unchanged_json_loads(read):
    read(json.dumps(CONTENT).encode())
