"""Loading the compiled CPU kernels of ``kernels/``."""

import warnings
from functools import cache
from pathlib import Path

import torch

from cpm_rcnn.ops.kernel_build import build_kernels
from cpm_rcnn.ops.kernel_cache import KernelError


def load_cpu_library(name: str) -> bool:
    """Load the operators of ``kernels/NAME.cpp`` and return whether they are available.

    The first call in a process compiles all kernels if the cache does not have them, and warns if that fails.

    Args:
        name: name of the source file without its suffix.
    """
    library = _libraries().get(name)
    if library is None:
        return False
    try:
        load_library(library)
    except KernelError as error:
        _warn(str(error))
        return False
    return True


def load_library(library: Path) -> None:
    """Register the operators of a compiled kernel with torch.

    Raises:
        KernelError: the system cannot load it.
    """
    try:
        torch.ops.load_library(library)
    except OSError as error:
        # The system's own message; some versions of torch put another one before it.
        reason = str(error.__cause__ or error).splitlines()[0]
        raise KernelError(f"{library.name} cannot be loaded ({reason})") from None


@cache
def _libraries() -> dict[str, Path]:
    """The compiled libraries by name. After a failure, this process does not try again."""
    libraries, failure = build_kernels()
    if failure is not None:
        _warn(failure)
    return libraries


def _warn(reason: str) -> None:
    warnings.warn(
        f"CPU kernels are missing: {reason}. The operators of torch and torchvision are used instead, which are "
        "slower. python -m cpm_rcnn.ops.compile_kernels tries again.",
        stacklevel=4,
    )
