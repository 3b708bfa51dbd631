"""In a module without torch, which a new process would have to import."""

import io
import multiprocessing
import zipfile

from cpm_rcnn.data.image_files import image_files
from cpm_rcnn.remote.urls import Url


def _read(places, queue):
    for files in places:
        queue.put(files.read("a.jpg"))


def test_a_spawned_process_reads_what_the_first_process_has_opened(http):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("train/a.jpg", b"in the archive")
    http.files.update({"/train/a.jpg": b"in the folder", "/train.zip": archive.getvalue()})
    places = [image_files(Url(f"{http.url}/{name}")) for name in ("train", "train.zip")]
    assert [files.read("a.jpg") for files in places] == [b"in the folder", b"in the archive"]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_read, args=(places, queue))
    process.start()
    assert [queue.get(timeout=120) for _ in places] == [b"in the folder", b"in the archive"]
    process.join()
