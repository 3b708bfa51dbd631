"""The interface of RoI heads, which turn proposals into detections."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from cpm_rcnn.models.heads.classification import Classifier
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import Detections, GroundTruth, Rois
from cpm_rcnn.settings import Settings


class Role(NamedTuple):
    """What a part of a head computes. Parts of two heads with equal roles can exchange weights.

    Attributes:
        kind: a name such as ``classifier``.
        stage: index of the part's stage.
        meaning: the value on which the meaning of the part's outputs depends, such as a mapping ratio.
    """

    kind: str
    stage: int = 0
    meaning: float | None = None


class RoIHead(nn.Module, ABC):
    """Base of all RoI heads.

    A head is registered in :data:`cpm_rcnn.models.heads.HEADS` under the name that ``head=NAME`` selects. It is
    constructed as ``Head(settings, inputs)``.

    Attributes:
        settings_class: the dataclass of the head's settings.
        optional_parts: flags of the settings that can be turned off at test, each with a submodule of the same name.
    """

    settings_class: ClassVar[type[Settings]]
    optional_parts: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def detect(self, features: Sequence[Tensor], proposals: Rois) -> Detections:
        """Detections of a batch; called in eval mode.

        Args:
            features: P2..P6, each (B, channels, H, W), in the format of
                :func:`~cpm_rcnn.models.pooling.pooling_format`.
            proposals: proposals of the RPN.

        Returns:
            The detections. Columns such as ``predicted_iou`` are optional. ``counts`` is optional too, and saves a wait
            for an accelerator: it is ``at_most`` of the RoIs that
            :func:`~cpm_rcnn.models.heads.classification.select_detections` returns.
        """

    @abstractmethod
    def losses(self, features: Sequence[Tensor], proposals: Rois, ground_truth: GroundTruth) -> dict[str, LossTerm]:
        """The training losses by name, each beginning with ``loss_``; the model minimizes their sum.

        Args:
            features: see :meth:`detect`.
            proposals: proposals of the RPN; ground-truth boxes are not among them.
            ground_truth: ground truth of the batch.
        """

    def roles(self) -> dict[str, Role]:
        """The roles of the head's parts, by the beginning of their parameter names; each parameter is in one part.

        By default each child module is a part whose role only heads of the same class have.
        """
        return {name: Role(f"{name} of {type(self).__name__}") for name, _ in self.named_children()}

    def class_parameters(self) -> list[str]:
        """Names of the parameters whose shape or meaning depends on the classes.

        A training that starts from a detector with other classes takes their rows by class name. By default they are
        those of the last layer of each :class:`~cpm_rcnn.models.heads.classification.Classifier`. A head with other
        layers of this kind extends the list.
        """
        return [
            f"{name}.predictor.{parameter}"
            for name, layer in self.named_modules()
            if isinstance(layer, Classifier)
            for parameter in layer.predictor.state_dict()
        ]
