"""How a batch gets from a DataLoader worker to the main process: in one file in memory, which is used again.

PyTorch moves each tensor into a new shared-memory file, three per image. Most of that time is spent by the system on
new pages. A worker here keeps its files, and overwrites one as soon as no tensor of the batch in it exists in the main
process. The files have no name (``memfd_create``): none is left however the processes end, and the size of /dev/shm,
which is 64 MB in a container by default, does not limit them.
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
# How many files a worker keeps: batches that wait (a DataLoader's prefetch_factor is 2), one in use, one being written.
_KEPT_FILES = 4


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
        self._files: list[FileIO] = []

    def __call__(self, samples: list[Any]) -> Any:
        """The batch of some samples, as an object that can be pickled once, for another process of this machine."""
        batch = self.collate(samples)
        file = self._unused_file()
        return batch if file is None else _SentBatch(batch, file)

    def _unused_file(self) -> FileIO | None:
        """A file with no batch that is still needed; None if the system does not allow one."""
        for file in self._files:
            if _is_unused(file):
                return file
        if sys.platform != "linux":
            return None
        try:
            file = open(os.memfd_create("batch"), "wb", buffering=0)  # noqa: SIM115, closed with the collate_fn
        except OSError:
            return None
        if len(self._files) < _KEPT_FILES:
            self._files.append(file)
        return file


def _is_unused(file: FileIO) -> bool:
    """Whether nobody holds the lock of :func:`_opened_for_batch`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _opened_for_batch(file: FileIO) -> FileIO:
    """The file opened once more, with a lock.

    The system releases the lock when the last descriptor and the last mapping made of it are gone, in whichever
    process they are: on the way to the main process, in it, in those that it forked.
    """
    opened = open(f"/proc/self/fd/{file.fileno()}", "r+b", buffering=0)  # noqa: SIM115, closed with the batch
    fcntl.flock(opened, fcntl.LOCK_SH)
    return opened


class _SentBatch:
    """A batch in a file in memory, of which pickling sends the descriptor."""

    def __init__(self, batch: Any, file: FileIO) -> None:
        buffers: list[pickle.PickleBuffer] = []
        content = io.BytesIO()
        _Pickler(content, 5, True, buffers.append).dump(batch)
        self._content = content.getvalue()
        self._spans: list[tuple[int, int]] = []
        self._file = _opened_for_batch(file)
        try:
            file.seek(0)
            for buffer in buffers:
                raw = buffer.raw()
                start = file.tell()
                self._spans.append((start, start + raw.nbytes))
                while raw:  # a system call writes at most 2 GB
                    raw = raw[file.write(raw) :]
                file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
        except OSError as error:
            megabytes = sum(buffer.raw().nbytes for buffer in buffers) / 1e6
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
        memory = memoryview(mmap.mmap(file, spans[-1][1])) if spans else memoryview(b"")
    finally:
        os.close(file)
    return pickle.loads(content, buffers=[memory[start:end] for start, end in spans])
