"""CPM R-CNN (arXiv 2003.03570): a two-stage detector whose boxes come from grid points.

``CPMRCNN`` and ``build_detector`` are the library's face; ``python -m cpm_rcnn.train``, ``.eval`` and ``.predict`` are
its commands.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpm_rcnn.models.build import build_detector
    from cpm_rcnn.models.detector import CPMRCNN

__all__ = ["CPMRCNN", "build_detector"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch is imported when a name is asked for, so that ``import cpm_rcnn`` itself is instant.
    if name == "build_detector":
        from cpm_rcnn.models.build import build_detector

        return build_detector
    if name == "CPMRCNN":
        from cpm_rcnn.models.detector import CPMRCNN

        return CPMRCNN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
