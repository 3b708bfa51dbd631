import gc
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cpm_rcnn.data.samplers import collate
from cpm_rcnn.data.worker_batches import CollateForMainProcess
from cpm_rcnn.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PyTorch sends the batches elsewhere")


class Samples(Dataset):
    """Images and targets with tensors of several dtypes and layouts."""

    def __init__(self, count=12, damaged=None):
        self.count = count
        self.damaged = damaged

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        if row == self.damaged:
            raise UserError(f"image {row} is damaged")
        rng = torch.Generator().manual_seed(row)
        image = torch.randint(0, 256, (40 + row, 30, 3), dtype=torch.uint8, generator=rng).permute(2, 0, 1)
        return image, {
            "boxes": torch.rand(row % 3, 4, generator=rng),
            "labels": torch.arange(row % 3),
            "mask": torch.rand(2, 3, 4, generator=rng).gt(0.5)[:, 1:, ::2].transpose(0, 1),
            "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
            "size": (row, 30),
            "name": f"image {row}",
        }


def loader(samples=None, num_workers=2, **options):
    chosen = CollateForMainProcess(collate) if num_workers else collate
    return DataLoader(samples or Samples(), batch_size=2, num_workers=num_workers, collate_fn=chosen, **options)


def same(first, second):
    if isinstance(first, torch.Tensor):
        return (
            torch.equal(first, second)
            and first.dtype == second.dtype
            and torch.empty_like(first).stride() == torch.empty_like(second).stride()
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def sent(sender, batch):
    """A batch after its way through a pipe."""
    return pickle.loads(ForkingPickler.dumps(sender(batch)))


def open_descriptors():
    """How many descriptors of files in memory this process has."""
    return sum(link(path).startswith("/memfd:batch") for path in Path("/proc/self/fd").iterdir())


def link(path):
    try:
        return os.readlink(path)
    except FileNotFoundError:  # the listing itself
        return ""


def open_at_most(count):
    """Whether that few files remain open; the thread that sends descriptors closes them a moment after they arrive."""
    deadline = time.monotonic() + 10
    # A file that a sender keeps has two descriptors: its own and that of its mapping.
    while open_descriptors() > 2 * count and time.monotonic() < deadline:
        time.sleep(0.01)
    return open_descriptors() <= 2 * count


@pytest.mark.parametrize(
    "options",
    [
        {"multiprocessing_context": "fork"},
        {"multiprocessing_context": "fork", "persistent_workers": True, "prefetch_factor": 4},
        {"multiprocessing_context": "spawn", "num_workers": 1},
    ],
    ids=["fork", "persistent", "spawn"],
)
def test_batches_equal_those_without_workers(options):
    expected = list(loader(num_workers=0))
    batches = loader(**options)
    for _ in range(2):
        # All batches of an epoch exist at the same time, so none may share its memory with another.
        assert same(list(batches), expected)


def test_batches_that_a_thread_pins_equal_those_without_workers(monkeypatch):
    pinned = []

    def pin_memory(tensor):
        pinned.append(threading.current_thread())
        return tensor.clone()

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    assert same(list(loader(pin_memory=True, multiprocessing_context="fork")), list(loader(num_workers=0)))
    assert threading.main_thread() not in pinned
    assert pinned


def test_one_file_is_enough_if_each_batch_is_received_before_the_next_one():
    sender = CollateForMainProcess(lambda batch: batch)
    for number in range(20):
        assert same(sent(sender, torch.full((100, 100), number)), torch.full((100, 100), number))
        assert open_at_most(1)


def test_a_batch_is_not_overwritten_by_later_ones_received_or_not():
    sender = CollateForMainProcess(lambda batch: batch)
    view = sent(sender, torch.zeros(100, 3))[2:, 1]
    array = sent(sender, torch.ones(100)).numpy()
    unread = ForkingPickler.dumps(sender(torch.full((100,), 2.0)))
    for _ in range(10):
        sent(sender, torch.full((1000,), 9.0))
    assert view.eq(0).all()
    assert (array == 1).all()
    assert pickle.loads(unread).eq(2).all()


def test_a_batch_is_not_overwritten_while_a_forked_process_has_it():
    sender = CollateForMainProcess(lambda batch: batch)
    batch = sent(sender, torch.zeros(1000))
    here, there = multiprocessing.get_context("fork").Pipe()

    def child(inherited):
        there.recv()
        there.send(inherited.eq(0).all().item())

    process = multiprocessing.get_context("fork").Process(target=child, args=(batch,))
    process.start()
    del batch
    for _ in range(5):
        sent(sender, torch.full((1000,), 9.0))
    here.send(None)
    assert here.recv()
    process.join()


def test_a_batch_can_be_changed():
    sender = CollateForMainProcess(lambda batch: batch)
    first = sent(sender, torch.zeros(10))
    first += 1
    assert first.eq(1).all()
    del first
    assert sent(sender, torch.zeros(10)).eq(0).all()


def test_batches_that_wait_leave_no_file_open_once_they_are_received():
    sender = CollateForMainProcess(lambda batch: batch)
    messages = [ForkingPickler.dumps(sender(torch.full((10,), number))) for number in range(20)]
    assert [int(pickle.loads(message)[0]) for message in messages] == list(range(20))
    assert open_at_most(3)
    del sender
    assert open_at_most(0)


def test_no_file_is_left_open_after_an_early_stop_and_an_error(monkeypatch):
    # Seconds that torch waits for each worker if garbage collection ends the iteration.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    iterator = iter(loader())
    next(iterator)
    del iterator
    with pytest.raises(UserError, match="image 7 is damaged"):
        list(loader(Samples(damaged=7)))
    gc.collect()
    assert open_at_most(0)


def test_a_batch_that_does_not_fit_in_memory_gives_one_line():
    sender = CollateForMainProcess(lambda batch: batch)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^no memory to pass a batch of 1\.0 MB .* \(File too large\); use fewer"):
            sender(torch.zeros(1_000_000, dtype=torch.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_expanded_tensor_keeps_its_values():
    sender = CollateForMainProcess(lambda batch: batch)
    assert torch.equal(sent(sender, torch.arange(3).expand(2, 3)), torch.arange(3).expand(2, 3))


@pytest.mark.parametrize("missing", ["memfd_create", "permission"])
def test_batches_are_the_same_where_files_in_memory_are_not_allowed(monkeypatch, missing):
    def refuse(name):
        raise PermissionError

    expected = list(loader(num_workers=0))
    monkeypatch.setattr(os, "memfd_create", refuse)
    if missing == "memfd_create":
        monkeypatch.setattr(sys, "platform", "darwin")
    assert same(list(loader(multiprocessing_context="fork")), expected)


SCRIPT = """
import os, sys, time
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker
from cpm_rcnn.data.worker_batches import CollateForMainProcess

worker.MP_STATUS_CHECK_INTERVAL = 0.2

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, row):
        return torch.full((1_000_000,), row % 256, dtype=torch.uint8)

loader = DataLoader(Images(), batch_size=2, num_workers=2, collate_fn=CollateForMainProcess(torch.stack))
iterator = iter(loader)
"""


def start(end, folder):
    """Start a process that runs SCRIPT and ``end``; it gets its temporary folder."""
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-c", SCRIPT + end]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def exists(process):
    return Path(f"/proc/{process}").exists()


def test_killed_processes_leave_no_file_behind(tmp_path):
    before = set(os.listdir("/dev/shm"))
    end = "next(iterator); print(*[worker.pid for worker in iterator._workers], flush=True); time.sleep(60)"
    process = start(end, tmp_path)
    workers = [int(word) for word in process.stdout.readline().split()]
    os.kill(workers[0], signal.SIGKILL)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(map(exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(exists, workers))
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("torch_")} == set()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_batch_of_a_killed_process_gives_one_line():
    here, there = multiprocessing.get_context("fork").Pipe()

    def child():
        there.send_bytes(ForkingPickler.dumps(CollateForMainProcess(lambda batch: batch)(torch.zeros(10))))
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    message = here.recv_bytes()
    process.kill()
    process.join()
    with pytest.raises(UserError, match=r"^a data worker ended before its batch was received; .* use fewer workers"):
        pickle.loads(message)


def can_mount():
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_batches_do_not_need_dev_shm():
    if not can_mount():
        pytest.skip("this process may not mount a small /dev/shm")
    end = "assert all(batch.eq(batch[:, :1]).all() for batch in iterator)"
    mount = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", sys.executable, "-c", SCRIPT + end]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")
