"""What the host reads from the device of its tensors: the one place that knows whether reading is free.

On a CPU, values and shapes are known as soon as they are computed. An accelerator runs behind the host: to read a
value, the host waits until the device has computed all that is queued, and then the device waits for the host. So on an
accelerator a subset of rows keeps a number of rows that the host knows, and the rows that do not belong to it are
marked as invalid. On a CPU they are dropped, so that no layer computes them.

While ``torch.export`` traces a model, no value can be read, and the graph must suit all shapes. Rows are dropped as on
a CPU: the graph has operators whose number of rows depends on the data.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# A condition on the device, () bool, and what raises the error if it is False.
Requirement = tuple[Tensor, Callable[[], None]]
_deferred: ContextVar[list[Requirement] | None] = ContextVar("deferred", default=None)


def reads_are_free(tensor: Tensor) -> bool:
    """Whether the host can read values of ``tensor`` without waiting for a device."""
    return tensor.device.type == "cpu"


def exporting() -> bool:
    """Whether ``torch.export`` is tracing: shapes are symbols, and a condition on a value or a shape is an error."""
    return torch.compiler.is_exporting()


def rows_where(mask: Tensor, at_most: int) -> Tensor:
    """The rows where ``mask`` is True, in ascending order.

    Args:
        mask: (R,) bool.
        at_most: an upper bound of their number that the host knows.

    Returns:
        (K,) int64. On a CPU, exactly these rows. On an accelerator, ``min(at_most, R)`` rows: these first, then others.
        In an exported graph, these rows, and row 0 if there are none, because not every runtime computes layers of no
        rows.
    """
    if exporting():
        first = torch.arange(mask.shape[0], device=mask.device) == 0
        rows = (mask | (first & ~mask.any())).nonzero().squeeze(1)
        torch._check(rows.shape[0] >= 1)
        return rows
    if reads_are_free(mask):
        return mask.nonzero().squeeze(1)
    if at_most >= len(mask):
        return torch.arange(len(mask), device=mask.device)
    return (~mask).to(torch.uint8).argsort(stable=True)[:at_most]


def from_host(values: Sequence[float], like: Tensor) -> Tensor:
    """``values`` as a tensor with the dtype and on the device of ``like``, without waiting."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


@contextmanager
def requirements_deferred(unread: list[Requirement] | None = None) -> Iterator[None]:
    """Within this context, :func:`require` does not wait; :func:`read` checks what was required before.

    Contexts can be nested, and the outermost counts. If it ends with an exception, nothing remains to be checked.

    Args:
        unread: receives what no :func:`read` has checked yet. Given again, it is checked in the next context.
    """
    if _deferred.get() is not None:
        yield
        return
    unread = [] if unread is None else unread
    token = _deferred.set(unread)
    try:
        yield
    except BaseException:
        unread.clear()
        raise
    finally:
        _deferred.reset(token)


def require(condition: Tensor, fail: Callable[[], None]) -> None:
    """Call ``fail``, which raises, if ``condition``, a () bool tensor, is False.

    It waits for the device, unless within :func:`requirements_deferred`. An exported graph does not check it.
    """
    if exporting():
        return
    deferred = _deferred.get()
    if deferred is not None and not reads_are_free(condition):
        deferred.append((condition, fail))
    elif not condition:
        fail()


def read(values: Tensor) -> Tensor:
    """``values`` (N,) on the host, after checking what was required before; waits for the device once."""
    deferred = _deferred.get()
    if not deferred:
        return values.cpu()
    conditions, fails = zip(*deferred)
    deferred.clear()
    together = torch.cat([torch.stack(conditions).to(values.dtype), values]).cpu()
    for holds, fail in zip(together.tolist(), fails):
        if not holds:
            fail()
    return together[len(fails) :]
