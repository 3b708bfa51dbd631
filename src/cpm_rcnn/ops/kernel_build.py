"""Compiling the CPU kernels, once per version of torch.

A compiled kernel works only with the version of torch whose headers it was compiled with. The kernels are therefore
compiled when they are first needed, and kept in a folder of :func:`cpm_rcnn.ops.kernel_cache.cache_folder` whose name
depends on everything that a library must fit.
"""

import hashlib
import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from cpm_rcnn.ops.kernel_cache import KernelError, cache_folder, create_folder, find_library, store_library

# Imported by name because mypy does not find a package that lies outside src/. Each .cpp file is one kernel.
SOURCES = Path(importlib.import_module("cpm_rcnn.kernels").__path__[0])
FLAGS = ("-O3", "-g0", "-std=c++20", "-fPIC", "-shared")
# at::parallel_for runs on OpenMP threads. Apple's compiler has no OpenMP, and the kernels run on one thread.
OPENMP = () if sys.platform == "darwin" else ("-fopenmp",)
# The flags of a single kernel. NMS rounds every operation, as torchvision does.
MORE_FLAGS = {"nms_cpu": ("-ffp-contract=off",)}
# Seconds. A kernel takes half a minute.
_COMPILE_LIMIT, _WAIT_LIMIT = 900, 1000


def build_kernels() -> tuple[dict[str, Path], str | None]:
    """Return the compiled library of each kernel, after compiling those that the cache does not have.

    One process compiles and others wait for it; messages on standard error say so.

    Returns:
        The path of each available library by the name of its source file without suffix; and the reason why others are
        missing, in one line, or None if none is missing.
    """
    names = sorted(path.stem for path in SOURCES.glob("*.cpp"))
    libraries: dict[str, Path] = {}
    failures: list[str] = []
    try:
        if sys.platform == "win32":
            raise KernelError("they are not compiled on Windows")
        folder = cache_folder() / _key()
        libraries = _find(folder, names)
        if len(libraries) < len(names):
            create_folder(folder)
            with _lock(folder):
                libraries = _find(folder, names)  # another process may have compiled them
                failures = _compile([name for name in names if name not in libraries], folder)
                libraries = _find(folder, names)
    except (KernelError, OSError) as error:
        return libraries, str(error)
    return libraries, failures[0] if failures else None


def compile_command(compiler: Sequence[str], source: Path, library: Path) -> list[str]:
    """Return the command that compiles a kernel.

    Args:
        compiler: the program and its first arguments.
        source: the ``.cpp`` file.
        library: the shared library to write.
    """
    # torch.utils.cpp_extension has these paths too, but its import needs setuptools and looks for CUDA.
    root = Path(torch.__file__).parent
    include = [f"-isystem{root / path}" for path in ("include", "include/torch/csrc/api/include")]
    flags = [*FLAGS, *OPENMP, *MORE_FLAGS.get(source.stem, ())]
    link = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    return [*compiler, *flags, *include, str(source), "-o", str(library), *link]


def _key() -> str:
    """The name of the folder for libraries of this version of the kernels, torch and the system.

    The compiler is not part of it, so that compiled kernels can be used where there is none.
    """
    system = (sys.platform, platform.machine(), *platform.libc_ver())
    key = hashlib.sha256(repr((torch.__version__, torch.version.git_version, system)).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        content = source.read_bytes()
        key.update(repr((source.name, len(content), FLAGS, OPENMP, MORE_FLAGS.get(source.stem))).encode() + content)
    return f"torch-{torch.__version__}-{key.hexdigest()[:16]}"


def _find(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    found = {name: find_library(folder, name) for name in names}
    return {name: path for name, path in found.items() if path is not None}


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time continue. The system releases the lock of a process that is killed."""
    lock = FileLock(folder / "lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _report(f"waiting for another process that compiles the CPU kernels: {folder}")
            lock.acquire(timeout=_WAIT_LIMIT, poll_interval=0.2)
    except Timeout:
        raise KernelError(f"another process compiles them for more than {_WAIT_LIMIT} s, see {folder}") from None
    except NotImplementedError:
        raise KernelError(f"{folder} does not support locks. Set CPM_RCNN_KERNELS to another folder") from None
    try:
        yield
    finally:
        lock.release()


def _compile(names: Sequence[str], folder: Path) -> list[str]:
    """Compile kernels in parallel into ``folder``, and return the reason of each failure."""
    if not names:
        return []
    compiler = _compiler()
    _report(f"compiling the CPU kernels for torch {torch.__version__}, once, about a minute: {folder}")
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda name: _compile_one(compiler, name, folder), names)
        failures = [failure for failure in results if failure is not None]
    _report(f"compiled {len(names) - len(failures)} of {len(names)} CPU kernels in {time.monotonic() - start:.0f} s")
    return failures


def _compiler() -> list[str]:
    """The C++ compiler: ``$CXX``, which may contain arguments, or the first that is installed."""
    named = os.environ.get("CXX", "").split()
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) is not None:
            return command
    missing = f"CXX={shlex.join(named)}: there is no such program" if named else "no C++ compiler is installed"
    raise KernelError(f"{missing}. Install g++ or clang++, or set CXX to a C++ compiler")


def _compile_one(compiler: Sequence[str], name: str, folder: Path) -> str | None:
    """Compile one kernel, and return why it failed, or None. The compiler's messages are kept if it fails."""
    partial, log = folder / f"{name}.partial", folder / f"{name}.log"
    try:
        with log.open("w") as messages:
            done = subprocess.run(
                compile_command(compiler, SOURCES / f"{name}.cpp", partial),
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=subprocess.STDOUT,
                env=os.environ | {"LC_ALL": "C"},
                timeout=_COMPILE_LIMIT,
            )
    except subprocess.TimeoutExpired:
        return f"{shlex.join(compiler)} has not compiled {name}.cpp within {_COMPILE_LIMIT} s"
    if done.returncode:
        lines = log.read_text(errors="replace").splitlines() or [f"exit status {done.returncode}"]
        error = next((line for line in lines if "error: " in line or "ld: " in line), lines[0])
        return f"{shlex.join(compiler)} cannot compile {name}.cpp ({error.strip()}). Its messages are in {log}"
    log.unlink()
    store_library(folder, name, partial)
    return None


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
