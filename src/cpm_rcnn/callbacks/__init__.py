"""What Lightning is told to do around a training step so that a run survives."""

from cpm_rcnn.callbacks.checkpoint_io import AtomicCheckpointIO
from cpm_rcnn.callbacks.interruption import EvaluationSignals, Interrupted, Interruption
from cpm_rcnn.callbacks.nonfinite import NonFiniteGuard
from cpm_rcnn.callbacks.step_seed import StepSeed

__all__ = ["AtomicCheckpointIO", "EvaluationSignals", "Interrupted", "Interruption", "NonFiniteGuard", "StepSeed"]
