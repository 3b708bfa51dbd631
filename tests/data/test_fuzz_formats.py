"""Damaged files of all formats: each is read or refused in one line."""

import random

import pytest

from cpm_rcnn.data.settings import DataSettings
from cpm_rcnn.data.splits import DataSplits
from cpm_rcnn.errors import UserError
from dataset_folders import shapes, write_coco, write_cvat, write_voc, write_yolo

MUTATIONS = 400
FILES = [
    (write_voc, "devkit", ("Annotations/train_000001.xml", "ImageSets/Main/train.txt")),
    (write_yolo, "lists", ("labels/train/000001.txt", "data.yaml", "train.txt")),
    (write_cvat, "subsets", ("annotations.xml",)),
    (write_coco, "annotations", ("annotations/instances_train2020.json",)),
]
PIECES = [
    *(b"", b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b" ", b"<", b">", b"&", b'"', b"[", b"{", b":", b"-", b"-1", b"0"),
    *(b"1e999", b"nan", b"inf", b"9" * 30, b"null", b"true", b"../..", b"/etc/passwd"),
]


def mutated(content, rng):
    """The content with one to four places replaced by random bytes or by something of a special meaning."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(changed) + 1)
        piece = rng.choice(PIECES) if rng.random() < 0.7 else bytes([rng.randrange(256)])
        changed[start : start + rng.choice([0, 1, 1, 3, 10, 50])] = piece
    return bytes(changed)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "shapes"


@pytest.fixture(scope="module")
def contents(source):
    return shapes(source, 3, 2)


@pytest.mark.parametrize(("write", "layout", "names"), FILES)
def test_a_damaged_file_is_read_or_refused_in_one_line(source, contents, tmp_path, write, layout, names):
    root = write(tmp_path, source, contents, layout)
    rng = random.Random(0)
    outcomes, messages = set(), []
    for number in range(MUTATIONS):
        path = root / names[number % len(names)]
        content = path.read_bytes()
        path.write_bytes(mutated(content, rng))
        for on_error in ("raise", "skip"):
            try:
                splits = DataSplits(DataSettings(root=str(root), on_error=on_error))
                assert len(splits.annotations("train"))
                assert splits.images("train").path.is_dir()
                outcomes.add("read")
            except UserError as error:
                messages.append(str(error))
                outcomes.add("refused")
        path.write_bytes(content)
    assert outcomes == {"read", "refused"}
    assert all(len(message.splitlines()) == 1 for message in messages)
