"""Builds the CPU kernel into the package; all else stands in pyproject.toml.

It needs torch to build against, which pip's isolated builds have not: ``pip install --no-build-isolation``. Without
torch, without a compiler, or where the build fails, the package is whole but for the kernel, and works on torchvision's
operator.
"""

import sys
from pathlib import Path

from setuptools import setup

KERNELS = Path("kernels")
# Torch's own threads are OpenMP's; where its headers do not see OpenMP, they work alone.
FLAGS, LINK = ["-O3", "-g0", "-std=c++20", "-fopenmp"], ["-fopenmp"]
if sys.platform == "win32":
    FLAGS, LINK = ["/O2", "/std:c++20", "/openmp"], []
elif sys.platform == "darwin":
    FLAGS, LINK = ["-O3", "-g0", "-std=c++20"], []

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    print("cpm_rcnn: no torch to build the CPU kernel against; see setup.py", file=sys.stderr)
    setup()
    sys.exit()


class BuildIfPossible(BuildExtension):
    """Goes on without an extension that cannot be built."""

    def __init__(self, *args, **kwargs):
        # A library that torch loads, and no Python module: one build serves every Python.
        super().__init__(*args, **kwargs, no_python_abi_suffix=True)

    def build_extensions(self):
        """Build, or say why not."""
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
