"""Loading the compiled CPU kernels of ``kernels/``."""

import importlib
import warnings
from pathlib import Path

import torch

# Imported by name because mypy does not find a package that lies outside src/.
_KERNELS = importlib.import_module("cpm_rcnn.kernels")


def load_cpu_library(name: str, feature: str) -> bool:
    """Load the operators of ``kernels/NAME.cpp`` and return whether they are available. Warn if they are not.

    Args:
        name: name of the source file without its suffix.
        feature: what the operators compute, for the warning.
    """
    libraries = sorted(path for folder in _KERNELS.__path__ for path in Path(folder).glob(f"{name}*.so"))
    try:
        if not libraries:
            raise OSError("it was not built when the package was installed")
        torch.ops.load_library(libraries[0])
    except OSError as error:
        warnings.warn(
            f"{feature}: no compiled CPU kernel ({str(error).splitlines()[0]}). The operator of torch or "
            "torchvision is used instead, which is slower. To build the kernel, run pip install --no-build-isolation "
            "cpm-rcnn with a C++ compiler installed.",
            stacklevel=3,
        )
        return False
    return True
