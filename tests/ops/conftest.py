import pytest

from cpm_rcnn.ops import conv3x3, deform_conv_backends, libraries, nms


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    """Let this process find neither compiled kernels nor a C++ compiler, as if it had not looked before."""
    monkeypatch.setenv("CPM_RCNN_KERNELS", str(tmp_path))
    monkeypatch.setenv("CXX", "nosuch++")
    loaded = [module.load_cpu_kernel for module in (conv3x3, deform_conv_backends, nms)]
    for cached in (libraries._libraries, *loaded):
        cached.cache_clear()
    yield
    for cached in (libraries._libraries, *loaded):
        cached.cache_clear()
