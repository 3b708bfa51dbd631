"""The interface of RoI heads, which turn proposals into detections."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import Detections, GroundTruth, Rois
from cpm_rcnn.settings import Settings


@dataclass(frozen=True)
class HeadInputs:
    """The properties of the rest of the model that a head depends on.

    Attributes:
        channels: number of channels of each level of the feature pyramid.
        strides: strides in pixels of the levels that the head pools from, P2 first.
        num_classes: number of foreground classes C.
        convention: the box coordinate convention.
    """

    channels: int
    strides: Sequence[int]
    num_classes: int
    convention: BoxConvention


class RoIHead(nn.Module, ABC):
    """Base of all RoI heads.

    A head is registered in :data:`cpm_rcnn.models.heads.HEADS` under the name that ``head=NAME`` selects. It is
    constructed as ``Head(settings, inputs)``. It classifies with a
    :class:`~cpm_rcnn.models.heads.classification.Classifier`, whose last layer is reinitialized when a training starts
    from a checkpoint with other classes.

    Attributes:
        settings_class: the dataclass of the head's settings.
    """

    settings_class: ClassVar[type[Settings]]

    @abstractmethod
    def detect(self, features: Sequence[Tensor], proposals: Rois) -> Detections:
        """Detections of a batch; called in eval mode.

        Args:
            features: P2..P6, each (B, channels, H, W), in the format of
                :func:`~cpm_rcnn.models.pooling.pooling_format`.
            proposals: proposals of the RPN.
        """

    @abstractmethod
    def losses(self, features: Sequence[Tensor], proposals: Rois, ground_truth: GroundTruth) -> dict[str, LossTerm]:
        """The training losses by name, each beginning with ``loss_``; the model minimizes their sum.

        Args:
            features: see :meth:`detect`.
            proposals: proposals of the RPN; ground-truth boxes are not among them.
            ground_truth: ground truth of the batch.
        """
