"""Builds the CPU kernels into the package. All other settings are in pyproject.toml.

The build needs torch, which is not available in pip's isolated builds: use ``pip install --no-build-isolation``. If
torch or a compiler is missing, or if the build fails, the package is installed without the kernels and uses
torchvision's operators instead.
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
# The flags of a single kernel. NMS rounds every operation, as torchvision does.
MORE_FLAGS = {"nms_cpu": [] if sys.platform == "win32" else ["-ffp-contract=off"]}

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    print("cpm_rcnn: built without the CPU kernels, because torch is not installed; see setup.py", file=sys.stderr)
    setup()
    sys.exit()


class BuildIfPossible(BuildExtension):
    """Skip the extensions if they cannot be built, instead of failing the installation."""

    def __init__(self, *args, **kwargs):
        # The libraries are loaded by torch and are not Python modules, so their names need no Python version.
        super().__init__(*args, **kwargs, no_python_abi_suffix=True)

    def build_extensions(self):
        """Build the extensions, or print why they were not built."""
        try:
            super().build_extensions()
        except Exception as error:
            print(f"cpm_rcnn: built without the CPU kernels: {error}", file=sys.stderr)
            self.extensions.clear()


setup(
    ext_modules=[
        CppExtension(
            f"cpm_rcnn.kernels.{name}",
            [str(KERNELS / f"{name}.cpp")],
            depends=[str(path) for path in KERNELS.glob("*.h")],
            extra_compile_args=FLAGS + MORE_FLAGS.get(name, []),
            extra_link_args=LINK,
        )
        for name in ("deform_conv_cpu", "nms_cpu", "winograd_cpu")
    ],
    cmdclass={"build_ext": BuildIfPossible},
)
