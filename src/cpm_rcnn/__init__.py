"""CPM R-CNN (arXiv 2003.03570): a two-stage detector whose boxes come from grid points.

In Python, :func:`load` gives a detector from a checkpoint, :func:`build_detector` a model from plain arguments, and
:func:`from_release` a model from the authors' weights. The commands are ``python -m cpm_rcnn.train``, ``.eval``,
``.predict`` and ``.convert``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpm_rcnn.inference.detector import Detector
    from cpm_rcnn.inference.load import load
    from cpm_rcnn.models.build import build_detector
    from cpm_rcnn.weights.release import from_release

__all__ = ["Detector", "build_detector", "from_release", "load"]
__version__ = "0.2.0.dev0"

_MODULES = {
    "Detector": "cpm_rcnn.inference.detector",
    "build_detector": "cpm_rcnn.models.build",
    "from_release": "cpm_rcnn.weights.release",
    "load": "cpm_rcnn.inference.load",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that ``import cpm_rcnn`` alone does not import torch.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
