"""The evaluation of a finished training: of its last and of its best checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torchmetrics import Metric

from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.weights.checkpoints import read_checkpoint
from cpm_rcnn.weights.resume import checkpoint_step


@dataclass(frozen=True)
class CheckpointEvaluation:
    """The evaluation of one checkpoint.

    Attributes:
        step: the training step of the checkpoint.
        metrics: what the metric computed.
        metric: the metric, which has the detections.
        operating_points: see :class:`~cpm_rcnn.evaluation.module.EvaluationModule`.
    """

    step: int
    metrics: dict[str, Any]
    metric: Metric
    operating_points: dict[str, Any] | None

    @classmethod
    def last_of(cls, module: DetectionModule, step: int) -> "CheckpointEvaluation":
        """The last evaluation of ``module``, which was at training step ``step``."""
        return cls(step, module.metrics, module.metric, module.operating_points)


def evaluate_checkpoints(
    trainer: pl.Trainer, module: DetectionModule, datamodule: CocoDataModule, run_dir: Path, select: str
) -> tuple[str, dict[str, CheckpointEvaluation]]:
    """Evaluate the last and the best checkpoint.

    Args:
        trainer: the trainer of the run.
        module: gets the weights of the selected checkpoint in the first process.
        datamodule: the data of the run.
        run_dir: the run's folder.
        select: the checkpoint to report, ``best`` or ``last``; ``best`` is the last if there is no best.

    Returns:
        The name of the selected checkpoint, and the evaluation of each by name.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # it leaves no checkpoint
        trainer.validate(module, datamodule=datamodule, verbose=False)
        return "last", {"last": CheckpointEvaluation.last_of(module, trainer.global_step)}
    paths = {name: run_dir / "checkpoints" / f"{name}.ckpt" for name in ("last", "best")}
    # Only the first process is sure to have the files. Without name=, the folder is named by the time, which can
    # differ between machines: take the first process's.
    steps = {}
    if trainer.is_global_zero:
        steps = {name: checkpoint_step(path) for name, path in paths.items() if path.exists()}
    paths, steps = trainer.strategy.broadcast((paths, steps))
    at_end = module.evaluated_step if module.evaluated_step == trainer.global_step else None
    evaluated = {} if at_end is None else {at_end: CheckpointEvaluation.last_of(module, at_end)}
    current = at_end
    for name, step in steps.items():
        if step not in evaluated:
            # In the logs, the metrics of an earlier step would be those of the last one.
            with _without_loggers(trainer) if step != trainer.global_step else nullcontext():
                trainer.validate(module, datamodule=datamodule, ckpt_path=paths[name], verbose=False, weights_only=True)
            evaluated[step], current = CheckpointEvaluation.last_of(module, step), step
    selected = select if select in steps else "last"
    if trainer.is_global_zero and current != steps[selected]:
        module.load_state_dict(read_checkpoint(paths[selected])["state_dict"])
    return selected, {name: evaluated[step] for name, step in steps.items()}


@contextmanager
def _without_loggers(trainer: pl.Trainer) -> Iterator[None]:
    loggers, trainer.loggers = trainer.loggers, []
    try:
        yield
    finally:
        trainer.loggers = loggers
