"""RoI heads. To add one: write its class and settings in a file of this package, and register it in ``HEADS``."""

from cpm_rcnn.models.heads.base import HeadInputs, RoIHead
from cpm_rcnn.models.heads.cpm import CPMHead

HEADS: dict[str, type[RoIHead]] = {"cpm": CPMHead}

__all__ = ["HEADS", "CPMHead", "HeadInputs", "RoIHead"]
