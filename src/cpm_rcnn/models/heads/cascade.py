"""The Cascade R-CNN head: box stages with rising IoU thresholds (arXiv 1712.00726)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.models.heads.box_head import BoxHead, BoxHeadSettings
from cpm_rcnn.models.heads.box_stage import BoxOutput, BoxStage, BoxStageSettings
from cpm_rcnn.models.heads.inputs import HeadInputs
from cpm_rcnn.settings import architecture, choice, inference, settings_list

# The stages of the paper; each corrects smaller errors than the previous one.
CASCADE_STAGES = (
    BoxStageSettings(0.5, (10, 10, 5, 5), 1.0),
    BoxStageSettings(0.6, (20, 20, 10, 10), 0.5),
    BoxStageSettings(0.7, (30, 30, 15, 15), 0.25),
)


def _is_stages(argument: str, value: Any) -> None:
    if not settings_list(BoxStageSettings, value, argument):
        raise ArgumentError(argument, "=[]: at least one box stage is needed")


@dataclass(frozen=True)
class CascadeSettings(BoxHeadSettings):
    """Settings of :class:`CascadeHead`, in addition to :class:`~cpm_rcnn.models.heads.box_head.BoxHeadSettings`.

    Attributes:
        stages: the box stages.
        score_average: what is averaged over the stages at test: ``probabilities`` (detectron2) or ``logits``
            (mmdetection).
    """

    stages: Sequence[BoxStageSettings] = architecture(CASCADE_STAGES, check=_is_stages)
    score_average: str = inference("probabilities", check=choice("probabilities", "logits"))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stages", settings_list(BoxStageSettings, self.stages, "stages"))


class CascadeHead(BoxHead):
    """The second stage of Cascade R-CNN: class-agnostic box stages whose scores are averaged at test.

    Args:
        settings: the stages, which parts the head has, their sizes, and how it is trained and tested.
        inputs: channels and strides of the pyramid, number of classes, and box convention.
    """

    settings_class = CascadeSettings
    settings: CascadeSettings

    def __init__(self, settings: CascadeSettings, inputs: HeadInputs) -> None:
        super().__init__(
            settings,
            inputs,
            [
                BoxStage(stage, inputs, mlp_channels=settings.mlp_channels, class_agnostic=True)
                for stage in settings.stages
            ],
        )

    def probabilities(self, outputs: Sequence[BoxOutput]) -> Tensor:
        """Class probabilities (R, C + 1) float32 of R RoIs, averaged over the stages."""
        logits = torch.stack([output.logits.float() for output in outputs])
        if self.settings.score_average == "logits":
            return torch.softmax(logits.mean(dim=0), dim=1)
        return torch.softmax(logits, dim=2).mean(dim=0)
