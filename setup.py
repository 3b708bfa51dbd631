"""Builds the CPU kernel into the package. All other settings are in pyproject.toml.

The build needs torch, which is not available in pip's isolated builds: use ``pip install --no-build-isolation``. If
torch or a compiler is missing, or if the build fails, the package is installed without the kernel and uses
torchvision's operator instead.
"""

import sys
from pathlib import Path

from setuptools import setup

KERNELS = Path("kernels")
# at::parallel_for runs on OpenMP threads. If this build does not enable OpenMP, it runs on one thread.
FLAGS, LINK = ["-O3", "-g0", "-std=c++20", "-fopenmp"], ["-fopenmp"]
if sys.platform == "win32":
    FLAGS, LINK = ["/O2", "/std:c++20", "/openmp"], []
elif sys.platform == "darwin":
    FLAGS, LINK = ["-O3", "-g0", "-std=c++20"], []

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    print("cpm_rcnn: built without the CPU kernel, because torch is not installed; see setup.py", file=sys.stderr)
    setup()
    sys.exit()


class BuildIfPossible(BuildExtension):
    """Skip the extension if it cannot be built, instead of failing the installation."""

    def __init__(self, *args, **kwargs):
        # The library is loaded by torch and is not a Python module, so its name needs no Python version.
        super().__init__(*args, **kwargs, no_python_abi_suffix=True)

    def build_extensions(self):
        """Build the extension, or print why it was not built."""
        try:
            super().build_extensions()
        except Exception as error:
            print(f"cpm_rcnn: built without the CPU kernel: {error}", file=sys.stderr)
            self.extensions.clear()


setup(
    ext_modules=[
        CppExtension(
            "cpm_rcnn.kernels.deform_conv_cpu",
            [str(KERNELS / "deform_conv_cpu.cpp")],
            depends=[str(path) for path in KERNELS.glob("*.h")],
            extra_compile_args=FLAGS,
            extra_link_args=LINK,
        )
    ],
    cmdclass={"build_ext": BuildIfPossible},
)
