"""RoI heads. To add one, write its class and settings in a module of this package and add it to ``HEADS``."""

from cpm_rcnn.models.heads.base import RoIHead
from cpm_rcnn.models.heads.cascade import CascadeHead
from cpm_rcnn.models.heads.cpm import CPMHead
from cpm_rcnn.models.heads.faster import FasterHead
from cpm_rcnn.models.heads.inputs import HeadInputs

HEADS: dict[str, type[RoIHead]] = {"cpm": CPMHead, "faster": FasterHead, "cascade": CascadeHead}

__all__ = ["HEADS", "CPMHead", "CascadeHead", "FasterHead", "HeadInputs", "RoIHead"]
