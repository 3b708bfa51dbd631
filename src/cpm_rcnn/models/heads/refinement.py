"""A cascade of stages, each of which refines the RoIs of the previous one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.models.finite import check_output
from cpm_rcnn.models.heads.roi_sampling import next_stage_rois
from cpm_rcnn.models.losses import LossTerm
from cpm_rcnn.models.structures import GroundTruth, Match, Rois


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
    """Base of the stages of a cascade.

    Attributes:
        settings: settings of the stage, such as its IoU threshold and loss weight.
    """

    settings: Any

    @abstractmethod
    def forward(self, features: Sequence[Tensor], rois: Rois) -> Any:
        """The stage's predictions (a :class:`StageOutput`) for R ``rois`` on the pyramid ``features``."""

    @abstractmethod
    def decode(self, output: Any, rois: Rois) -> Rois:
        """``rois`` with the boxes that ``output`` predicts for them, detached."""

    @abstractmethod
    def losses(self, output: Any, rois: Rois, match: Match) -> dict[str, LossTerm]:
        """The losses of ``output`` for ``rois`` with the ground truth ``match``, times the stage's loss weight.

        Their names are short, for example ``grid``; the cascade appends the index of the stage.
        """


_Stage = TypeVar("_Stage", bound=RefinementStage)


def refine(stages: Sequence[RefinementStage], features: Sequence[Tensor], rois: Rois) -> tuple[Rois, list[Any]]:
    """Run ``rois`` through all ``stages`` at test.

    Returns:
        The refined RoIs, and the output of each stage (:class:`StageOutput`).

    Raises:
        UserError: a stage decodes boxes that are not finite.
    """
    outputs = []
    for k, stage in enumerate(stages):
        outputs.append(stage(features, rois))
        rois = stage.decode(outputs[-1], rois)
        check_output(f"head.stages.{k}", stage, rois.boxes)
    return rois, outputs


@dataclass(frozen=True)
class TrainedCascade:
    """The result of a cascade in training.

    Attributes:
        losses: the losses of all stages, named by the stage's name for them and its index, for example ``grid0``.
        rois: R RoIs that entered the last stage.
        match: their ground truth.
        output: what the last stage predicted for them.
    """

    losses: dict[str, LossTerm]
    rois: Rois
    match: Match
    output: Any


def train_cascade(
    stages: Sequence[_Stage],
    features: Sequence[Tensor],
    rois: Rois,
    match: Match,
    ground_truth: GroundTruth,
    convention: BoxConvention,
    select: Callable[[_Stage, Rois, Match], tuple[Rois, Match]],
) -> TrainedCascade:
    """Run RoIs through all stages in training.

    Each stage after the first receives the boxes that the previous stage decoded, and the ground-truth boxes.

    Args:
        stages: the stages, at least one.
        features: the pyramid.
        rois: RoIs of the first stage.
        match: their ground truth.
        ground_truth: ground truth of the batch.
        convention: the box coordinate convention.
        select: chooses the RoIs that train a later stage: ``(stage, candidates, their match)`` to RoIs and match.
    """
    losses: dict[str, LossTerm] = {}
    output: Any = None
    for k, stage in enumerate(stages):
        if k:
            decoded = stages[k - 1].decode(output, rois)
            candidates, candidates_match = next_stage_rois(rois, decoded, match, ground_truth, convention)
            rois, match = select(stage, candidates, candidates_match)
        output = stage(features, rois)
        losses |= {f"{name}{k}": term for name, term in stage.losses(output, rois, match).items()}
    return TrainedCascade(losses, rois, match, output)
