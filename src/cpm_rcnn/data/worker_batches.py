"""How a batch gets from a DataLoader worker to the main process: in one file in memory, which is used again.

PyTorch moves each tensor into a new shared-memory file, three per image. Most of that time is spent by the system on
new pages. A worker here keeps its files mapped, and overwrites one as soon as the main process has copied the batch in
it. The files have no name (``memfd_create``): none is left however the processes end, and the size of /dev/shm, which
is 64 MB in a container by default, does not limit them.
"""

import io
import mmap
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from io import FileIO
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from cpm_rcnn.errors import UserError

if sys.platform == "linux":
    import fcntl
    from multiprocessing.reduction import DupFd

# Tensors start at multiples of this many bytes.
_ALIGNMENT = 64
# How many files a worker keeps: those of batches that wait (a DataLoader's prefetch_factor is 2), one being written.
_KEPT_FILES = 3


class CollateForMainProcess:
    """A ``collate_fn`` for workers, whose batches the main process receives as ``collate`` returned them.

    Tensors keep their values, dtypes, and order of dimensions in memory. The main process may keep and change them. On
    systems other than Linux, or if the system does not allow files in memory, PyTorch sends the batches its own way.

    Args:
        collate: builds a batch, which may be any nested structure, from a list of samples.

    Raises:
        UserError: there is not enough memory for a batch.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate
        self._files: list[_File] = []

    def __call__(self, samples: list[Any]) -> Any:
        """The batch of some samples, as an object that can be pickled once, for another process of this machine."""
        batch = self.collate(samples)
        file = self._unused_file()
        return batch if file is None else _SentBatch(batch, file)

    def _unused_file(self) -> "_File | None":
        """A file with no batch that is still needed; None if the system does not allow one."""
        for file in self._files:
            if file.is_unused():
                return file
        if sys.platform != "linux":
            return None
        try:
            file = _File()
        except OSError:
            return None
        if len(self._files) < _KEPT_FILES:
            self._files.append(file)
        return file


class _File:
    """A file in memory that holds one batch at a time.

    Raises:
        OSError: the system does not allow one.
    """

    def __init__(self) -> None:
        self._file = open(os.memfd_create("batch"), "r+b", buffering=0)  # noqa: SIM115, closed with this object
        self._mapping: mmap.mmap | None = None

    def is_unused(self) -> bool:
        """Whether nobody holds the lock of :meth:`opened`."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return True

    def opened(self) -> FileIO:
        """The file opened once more, with a lock.

        The system releases the lock when the last copy of the descriptor is closed, in whichever process it is: in this
        one, on the way to the main process, in it.
        """
        opened = open(f"/proc/self/fd/{self._file.fileno()}", "rb", buffering=0)  # noqa: SIM115, closed with the batch
        fcntl.flock(opened, fcntl.LOCK_SH)
        return opened

    def write(self, buffers: Sequence[memoryview]) -> list[tuple[int, int]]:
        """Write buffers of bytes, and return where each of them starts and ends.

        Raises:
            OSError: there is not enough memory.
        """
        spans, end = [], 0
        for buffer in buffers:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + buffer.nbytes
            spans.append((start, end))
        if end > (0 if self._mapping is None else len(self._mapping)):
            # Writing to a mapped page for which there is no memory would end the process.
            os.posix_fallocate(self._file.fileno(), 0, end)
            self._mapping = mmap.mmap(self._file.fileno(), end)
        if self._mapping is not None:
            for (start, end), buffer in zip(spans, buffers):
                self._mapping[start:end] = buffer
        return spans


class _SentBatch:
    """A batch in a file in memory, of which pickling sends the descriptor."""

    def __init__(self, batch: Any, file: _File) -> None:
        buffers: list[pickle.PickleBuffer] = []
        content = io.BytesIO()
        _Pickler(content, 5, True, buffers.append).dump(batch)
        self._content = content.getvalue()
        self._file = file.opened()
        views = [buffer.raw() for buffer in buffers]
        try:
            self._spans = file.write(views)
        except OSError as error:
            megabytes = sum(view.nbytes for view in views) / 1e6
            raise UserError(
                f"no memory to pass a batch of {megabytes:.1f} MB from a data worker to the main process "
                f"({error.strerror}); use fewer workers or smaller batches"
            ) from error

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _received, (DupFd(self._file.fileno()), self._content, self._spans)


class _Pickler(ForkingPickler):
    """Pickles tensors as buffers outside of the stream."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.device.type != "cpu" or not value.numel() or value.requires_grad:
            return NotImplemented
        # Images have their channels last in memory, which makes them fast to decode and to resize.
        strides = value.stride()
        order = sorted(range(value.ndim), key=lambda axis: -strides[axis])
        dense = value.permute(order).contiguous()
        inverse = sorted(range(value.ndim), key=order.__getitem__)
        buffer = pickle.PickleBuffer(dense.flatten().view(torch.uint8).numpy().data)
        return _tensor, (buffer, dense.dtype, dense.shape, inverse)


def _tensor(buffer: memoryview, dtype: torch.dtype, shape: Sequence[int], order: list[int]) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype).view(shape).permute(order)


def _received(descriptor: Any, content: bytes, spans: Sequence[tuple[int, int]]) -> Any:
    try:
        file = descriptor.detach()
    except (OSError, EOFError) as error:
        raise UserError(
            "a data worker ended before its batch was received; the system may have killed it for lack of memory: "
            "use fewer workers or smaller batches"
        ) from error
    try:
        memory = torch.empty(spans[-1][1] if spans else 0, dtype=torch.uint8).numpy().data
        # A copy takes less time than page faults in a new mapping of the file.
        read = 0
        while read < len(memory):  # a system call reads at most 2 GB
            read += os.preadv(file, [memory[read:]], read)
    finally:
        os.close(file)
    return pickle.loads(content, buffers=[memory[start:end] for start, end in spans])
