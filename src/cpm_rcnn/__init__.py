"""CPM R-CNN (arXiv 2003.03570): a two-stage detector whose boxes come from grid points.

``CPMRCNN``, ``build_detector`` and ``from_release`` are the library's face; ``python -m cpm_rcnn.train``, ``.eval``,
``.predict`` and ``.convert`` are its commands.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpm_rcnn.models.build import build_detector
    from cpm_rcnn.models.detector import CPMRCNN
    from cpm_rcnn.weights.release import from_release

__all__ = ["CPMRCNN", "build_detector", "from_release"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch is imported when a name is asked for, so that ``import cpm_rcnn`` itself is instant.
    if name == "build_detector":
        from cpm_rcnn.models.build import build_detector

        return build_detector
    if name == "CPMRCNN":
        from cpm_rcnn.models.detector import CPMRCNN

        return CPMRCNN
    if name == "from_release":
        from cpm_rcnn.weights.release import from_release

        return from_release
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
