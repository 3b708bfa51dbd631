"""What must stand before anything is imported, and what must be done before any test."""

import os

import pytest
import torch

# Without a card, Triton's kernels run on the CPU under its interpreter; it is chosen when triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Several processes run the tests (pytest-xdist), and each would take all cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_sessionstart() -> None:
    """Compile the CPU kernels if necessary, because the time of some tests is limited."""
    from cpm_rcnn.ops.kernel_build import build_kernels

    if "PYTEST_XDIST_WORKER" not in os.environ:
        build_kernels()


@pytest.fixture
def http(tmp_path, monkeypatch):
    """A server on loopback, and an empty cache of what is read from it."""
    from remote_servers import be_quick, http_server

    be_quick(monkeypatch)
    monkeypatch.setenv("CPM_RCNN_CACHE", str(tmp_path / "cache"))
    with http_server() as server:
        yield server
