"""A cascade of stages, each of which refines the RoIs of the previous one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import Match, Rois


class StageOutput(Protocol):
    """What a stage predicts for R RoIs.

    Attributes:
        features: (R, ...), features of each RoI; ISM uses those of the last stage.
    """

    @property
    def features(self) -> Tensor:
        """(R, ...)."""
        ...


class RefinementStage(nn.Module, ABC):
    """Base of the stages of a cascade."""

    @abstractmethod
    def forward(self, features: Sequence[Tensor], rois: Rois) -> Any:
        """The stage's predictions (a :class:`StageOutput`) for R ``rois`` on the pyramid ``features``."""

    @abstractmethod
    def decode(self, output: Any, rois: Rois) -> Rois:
        """``rois`` with the boxes that ``output`` predicts for them, detached."""

    @abstractmethod
    def loss(self, output: Any, rois: Rois, match: Match) -> LossTerm:
        """The loss of ``output`` for ``rois`` with the ground truth ``match``, times the stage's loss weight."""


def refine(stages: Sequence[RefinementStage], features: Sequence[Tensor], rois: Rois) -> tuple[Rois, list[StageOutput]]:
    """Run ``rois`` through all ``stages`` at test.

    Returns:
        The refined RoIs, and the output of each stage.
    """
    outputs = []
    for stage in stages:
        outputs.append(stage(features, rois))
        rois = stage.decode(outputs[-1], rois)
    return rois, outputs
