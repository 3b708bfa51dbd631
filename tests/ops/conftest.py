import shutil

import pytest
import torch

from cpm_rcnn.ops import conv3x3, deform_conv_backends, libraries, nms, normalize

KERNELS = (conv3x3, deform_conv_backends, nms, normalize)


@pytest.fixture(scope="module")
def cpu_kernels():
    """Load the compiled operators. Skip the tests without them, but only on a machine that has no compiler."""
    if not all(module.load_cpu_kernel() for module in KERNELS):
        assert shutil.which("c++") is None, "not compiled: see python -m cpm_rcnn.ops.compile_kernels"
        pytest.skip("the CPU kernels are not compiled, and there is no compiler")


@pytest.fixture
def set_threads():
    """``torch.set_num_threads``; the number is set back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    """Let this process find neither compiled kernels nor a C++ compiler, as if it had not looked before."""
    monkeypatch.setenv("CPM_RCNN_KERNELS", str(tmp_path))
    monkeypatch.setenv("CXX", "nosuch++")
    loaded = [module.load_cpu_kernel for module in KERNELS]
    for cached in (libraries._libraries, *loaded):
        cached.cache_clear()
    yield
    for cached in (libraries._libraries, *loaded):
        cached.cache_clear()
