"""The Faster R-CNN head: one box stage with class-specific regression (arXiv 1506.01497, on FPN: 1612.03144)."""

from dataclasses import dataclass

from cpm_rcnn.models.heads.box_head import BoxHead, BoxHeadSettings
from cpm_rcnn.models.heads.box_stage import BoxStage, BoxStageSettings
from cpm_rcnn.models.heads.inputs import HeadInputs


@dataclass(frozen=True)
class FasterSettings(BoxHeadSettings):
    """Settings of :class:`FasterHead`; see :class:`~cpm_rcnn.models.heads.box_head.BoxHeadSettings`."""


class FasterHead(BoxHead):
    """The second stage of Faster R-CNN: positives at IoU 0.5, coder weights (10, 10, 5, 5), one box per class.

    Args:
        settings: which parts the head has, their sizes, and how it is trained and tested.
        inputs: channels and strides of the pyramid, number of classes, and box convention.
    """

    settings_class = FasterSettings
    settings: FasterSettings

    def __init__(self, settings: FasterSettings, inputs: HeadInputs) -> None:
        stage = BoxStage(BoxStageSettings(), inputs, mlp_channels=settings.mlp_channels, class_agnostic=False)
        super().__init__(settings, inputs, [stage])

    def class_parameters(self) -> list[str]:
        """The classification layers, and the regressor, which has four rows per class."""
        return [*super().class_parameters(), *(f"stages.0.regressor.{name}" for name in ("weight", "bias"))]
