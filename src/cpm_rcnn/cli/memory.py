"""How the C library of this process manages freed memory."""

import ctypes
import sys

# Parameters of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones; with another C library, nothing happens.

    By default glibc returns each freed block of 32 MiB or more to the system, and each training step on a CPU gets its
    activations again in pages that the system first fills with zeros. The peak of the memory stays about the same
    (docs/performance.md). Processes that are forked later inherit the setting.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
