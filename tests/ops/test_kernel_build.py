"""Compiling kernels once, the folder that keeps them, and what happens when that fails."""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from filelock import FileLock

from cpm_rcnn.ops import compile_kernels, deform_conv2d, kernel_build, libraries
from cpm_rcnn.ops.conv3x3 import conv3x3
from cpm_rcnn.ops.kernel_build import build_kernels
from cpm_rcnn.ops.kernel_cache import cache_folder
from cpm_rcnn.ops.nms import nms_mask

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
BROKEN = "#include <cstdio>\nint answer() { return missing; }\n"


class Workplace:
    """A tiny kernel in place of the real ones, an empty cache, and a compiler that counts its calls."""

    def __init__(self, folder: Path) -> None:
        self.sources, self.cache, self.calls = folder / "sources", folder / "cache", folder / "calls"
        self.compiler = folder / "compiler"
        self.sources.mkdir()
        self.add("tiny", 'extern "C" int answer() { return 42; }\n')
        self.compile_with('exec c++ "$@"')

    def add(self, name: str, source: str) -> None:
        (self.sources / f"{name}.cpp").write_text(source)

    def compile_with(self, command: str) -> None:
        self.compiler.write_text(f"#!/bin/sh\necho call >> {self.calls}\n{command}\n")
        self.compiler.chmod(0o755)

    def compilations(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    place = Workplace(tmp_path)
    monkeypatch.setattr(kernel_build, "SOURCES", place.sources)
    monkeypatch.setenv("CPM_RCNN_KERNELS", str(place.cache))
    monkeypatch.setenv("CXX", str(place.compiler))
    return place


def built() -> Path:
    found, failure = build_kernels()
    assert failure is None
    return found["tiny"]


@needs_compiler
def test_a_kernel_is_compiled_once_with_messages_and_then_found(workplace, capfd):
    library = built()
    assert ctypes.CDLL(str(library)).answer() == 42
    first, second = capfd.readouterr().err.splitlines()
    assert first == f"compiling the CPU kernels for torch {torch.__version__}, once, about a minute: {library.parent}"
    assert second.startswith("compiled 1 of 1 CPU kernels in ")
    assert built() == library
    assert capfd.readouterr().err == ""
    assert workplace.compilations() == 1
    assert {path.name for path in library.parent.iterdir()} == {library.name, "lock"}


@needs_compiler
def test_one_of_several_processes_compiles_and_the_others_wait(workplace, capfd):
    workplace.compile_with('sleep 0.5; exec c++ "$@"')
    fork = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks in a process with threads
        processes = [fork.Process(target=built) for _ in range(3)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert workplace.compilations() == 1
    messages = capfd.readouterr().err
    assert messages.count("compiling the CPU kernels") == 1
    assert messages.count("waiting for another process that compiles the CPU kernels") == 2
    built()
    assert workplace.compilations() == 1


@needs_compiler
def test_another_torch_and_other_sources_and_flags_have_libraries_of_their_own(workplace, monkeypatch):
    first = built()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        other_torch = built()
        assert other_torch.parent.name.startswith("torch-2.99.0-")
    with monkeypatch.context() as patch:
        patch.setitem(kernel_build.MORE_FLAGS, "tiny", ("-DX",))
        other_flags = built()
    assert built() == first
    assert workplace.compilations() == 3
    (workplace.sources / "part.h").write_text("// changed\n")
    other_source = built()
    assert len({path.parent for path in (first, other_torch, other_flags, other_source)}) == 4


@needs_compiler
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-100], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_library_is_compiled_again_once(workplace, damage):
    library = built()
    library.write_bytes(damage(library.read_bytes()))
    assert ctypes.CDLL(str(built())).answer() == 42
    built()
    assert workplace.compilations() == 2


@needs_compiler
@pytest.mark.parametrize("level", range(3), ids=["library", "version", "cache"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_other_users_can_write_is_refused(workplace, level, mode):
    library = built()
    unsafe = [library, *library.parents][level]
    unsafe.chmod(unsafe.stat().st_mode | mode)
    assert build_kernels() == ({}, f"{unsafe} can be written by other users. Run chmod go-w {unsafe}")
    unsafe.chmod(unsafe.stat().st_mode & ~mode)
    assert built() == library


@needs_compiler
def test_an_empty_folder_that_other_users_can_write_is_refused_before_compiling(workplace):
    workplace.cache.mkdir()
    workplace.cache.chmod(0o777)
    assert build_kernels()[1].startswith(f"{workplace.cache} can be written by other users")
    assert not workplace.compilations()


@needs_compiler
def test_what_belongs_to_another_user_is_refused(workplace, monkeypatch):
    folder = built().parent
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        folder = workplace.cache
    assert build_kernels() == ({}, f"{folder} belongs to another user. Set CPM_RCNN_KERNELS to a folder of your own")


@needs_compiler
def test_the_cache_may_be_in_a_folder_such_as_tmp_and_is_private_whatever_the_umask(workplace):
    workplace.cache.mkdir()
    workplace.cache.chmod(0o1777)
    before = os.umask(0)
    try:
        library = built()
    finally:
        os.umask(before)
    for path in (library, library.parent):
        assert not path.stat().st_mode & 0o022
    assert built() == library


@needs_compiler
def test_a_compile_error_is_told_in_one_line_and_the_other_kernels_are_used(workplace):
    workplace.add("broken", BROKEN)
    found, failure = build_kernels()
    assert list(found) == ["tiny"]
    log = found["tiny"].with_name("broken.log")
    assert failure.startswith(f"{workplace.compiler} cannot compile broken.cpp (")
    assert "error: " in failure
    assert failure.endswith(f"). Its messages are in {log}")
    assert "\n" not in failure
    assert "missing" in log.read_text()
    # A later process tries the broken one again.
    build_kernels()
    assert workplace.compilations() == 3


def test_a_compiler_that_fails_without_a_message_or_hangs_is_reported(workplace, monkeypatch):
    workplace.compile_with("exit 3")
    assert "cannot compile tiny.cpp (exit status 3)" in build_kernels()[1]
    monkeypatch.setattr(kernel_build, "_COMPILE_LIMIT", 0.2)
    workplace.compile_with("exec sleep 20")
    assert build_kernels() == ({}, f"{workplace.compiler} has not compiled tiny.cpp within 0.2 s")


def test_a_process_that_never_ends_compiling_is_not_waited_for_forever(workplace, monkeypatch):
    workplace.compile_with("exit 3")
    folder = Path(build_kernels()[1].split("messages are in ")[1]).parent
    monkeypatch.setattr(kernel_build, "_WAIT_LIMIT", 0.1)
    with FileLock(folder / "lock"):
        assert build_kernels() == ({}, f"another process compiles them for more than 0.1 s, see {folder}")


def test_a_cache_that_cannot_be_written_and_a_missing_home_are_reported(workplace, monkeypatch):
    (workplace.sources / "file").touch()
    monkeypatch.setenv("CPM_RCNN_KERNELS", str(workplace.sources / "file/user/cache"))
    assert "file/user/cache cannot be written (Not a directory). Set CPM_RCNN_KERNELS to a folder" in build_kernels()[1]
    monkeypatch.setenv("CPM_RCNN_KERNELS", "~nosuchuser/cache")
    assert build_kernels()[1].endswith("Set CPM_RCNN_KERNELS to a folder")
    assert not workplace.compilations()


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.delenv("CPM_RCNN_KERNELS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_folder() == Path("/home/user/.cache/cpm_rcnn/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert cache_folder() == Path("/scratch/cpm_rcnn/kernels")
    monkeypatch.setenv("CPM_RCNN_KERNELS", "~/kernels")
    assert cache_folder() == Path("/home/user/kernels")


def test_without_a_compiler_there_is_one_warning_and_the_operators_of_torch_are_used(no_compiler):
    image, weight, offset = torch.rand(1, 64, 20, 20), torch.rand(64, 64, 3, 3), torch.rand(1, 18, 18, 18)
    boxes, scores = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]]), torch.tensor([0.9, 0.8, 0.7])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = nms_mask(boxes, scores, torch.zeros(3, dtype=torch.int64), 0.5)
        output, deformed = conv3x3(image, weight), deform_conv2d(image, offset, weight)
    assert [str(warning.message) for warning in caught] == [
        "CPU kernels are missing: CXX=nosuch++: there is no such program. Install g++ or clang++, or set CXX to a C++ "
        "compiler. The operators of torch and torchvision are used instead, which are slower. "
        "python -m cpm_rcnn.ops.compile_kernels tries again."
    ]
    assert kept.tolist() == [True, False, True]
    torch.testing.assert_close(output, torch.nn.functional.conv2d(image, weight, padding=1))
    torch.testing.assert_close(deformed, torchvision.ops.deform_conv2d(image, offset, weight))


@needs_compiler
def test_without_a_compiler_the_kernels_that_are_there_are_used(workplace, monkeypatch):
    library = built()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(workplace.sources))
    assert build_kernels() == ({"tiny": library}, None)
    library.with_name("tiny-0.so").write_text("damaged")
    assert built() == library
    library.write_text("damaged")
    found, failure = build_kernels()
    assert not found
    assert failure.startswith("no C++ compiler is installed. Install g++ or clang++")


@needs_compiler
def test_a_library_that_does_not_fit_the_system_is_reported_and_not_used(workplace, no_compiler, monkeypatch):
    monkeypatch.setenv("CPM_RCNN_KERNELS", str(workplace.cache))
    monkeypatch.setenv("CXX", str(workplace.compiler))
    workplace.add("tiny", "int missing(); int answer = missing();\n")
    with pytest.warns(UserWarning, match=r"tiny-\w+\.so cannot be loaded \(.*undefined symbol"):
        assert not libraries.load_cpu_library("tiny")


@needs_compiler
def test_compiling_ahead_prints_the_paths_or_ends_with_an_error(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_kernels"])
    compile_kernels.main()
    assert capsys.readouterr().out == f"{built()}\n"
    workplace.add("broken", BROKEN)
    with pytest.raises(SystemExit, match=r"error: .* cannot compile broken\.cpp"):
        compile_kernels.main()


def test_an_import_compiles_nothing(tmp_path):
    environment = os.environ | {"CPM_RCNN_KERNELS": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", "import cpm_rcnn.ops, cpm_rcnn.ops.nms"], check=True, env=environment)
    assert not (tmp_path / "cache").exists()
