"""A cascade of stages, each of which turns RoIs into better ones."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from cpm_rcnn.models.finite import check_output
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import Match, Rois


class StageOutput(Protocol):
    """What a stage predicts for R RoIs.

    Attributes:
        features: (R, ...), the stage's features of each RoI; ISM reads those of the last stage.
    """

    @property
    def features(self) -> Tensor:
        """(R, ...)."""
        ...


class RefinementStage(nn.Module, ABC):
    """Base of the stages of a cascade."""

    @abstractmethod
    def forward(self, features: Sequence[Tensor], rois: Rois) -> Any:
        """The stage's predictions for R ``rois`` on the pyramid ``features``; a :class:`StageOutput`."""

    @abstractmethod
    def decode(self, output: Any, rois: Rois) -> Rois:
        """The boxes that ``output`` predicts for ``rois``, without gradient."""

    @abstractmethod
    def loss(self, output: Any, rois: Rois, match: Match) -> LossTerm:
        """The stage's loss, times its loss weight."""


def refine(stages: Sequence[RefinementStage], features: Sequence[Tensor], rois: Rois) -> tuple[Rois, list[StageOutput]]:
    """Run ``rois`` through all ``stages`` at test: the refined RoIs, and the output of each stage.

    Raises:
        UserError: a stage decodes boxes that are not finite.
    """
    outputs = []
    for k, stage in enumerate(stages):
        outputs.append(stage(features, rois))
        rois = stage.decode(outputs[-1], rois)
        check_output(f"head.stages.{k}", stage, rois.boxes)
    return rois, outputs
