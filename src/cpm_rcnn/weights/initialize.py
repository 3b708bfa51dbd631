"""Starting weights of a new training: a detector's checkpoint, or a pretrained backbone."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpm_rcnn.errors import ArgumentError, UserError, shown
from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.models.finite import check_weights
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.weights.backbone import load_backbone
from cpm_rcnn.weights.checkpoints import checkpoint_file, detector_state, read_checkpoint
from cpm_rcnn.weights.checkpoints import class_names as names_in
from cpm_rcnn.weights.reading import check_names

_log = logging.getLogger(__name__)


def initialize(detector: TwoStageDetector, class_names: Sequence[str] = (), *, init: str | Path | None = None) -> None:
    """Load the starting weights of a training that does not resume another.

    Without ``init``, the backbone gets the weights that its settings name, if any; all other weights stay random.

    Args:
        detector: the detector, with the random weights that it was constructed with.
        class_names: names of the detector's classes 1..C; only ``init`` needs them.
        init: a checkpoint of ``train`` or ``convert``. Classification layers are reinitialized if the class names
            differ; everything else must fit.

    Raises:
        UserError: the file does not exist, is damaged, or contains the weights of another model or weights that are not
            finite.
    """
    if init is not None:
        _start_from(detector, class_names, init)
    elif detector.settings.backbone.weights is not None:
        load_backbone(detector.backbone.body, detector.settings.backbone, detector.settings.backbone.weights)


def _start_from(detector: TwoStageDetector, class_names: Sequence[str], path: str | Path) -> None:
    source = f"init={path}"
    path = checkpoint_file(path, "init")
    checkpoint = read_checkpoint(path, "init")
    check_same_model(checkpoint, detector.settings, source)
    state, own = detector_state(checkpoint), detector.state_dict()
    if names_in(checkpoint) != list(class_names):
        reinitialized = [f"head.{name}" for name in detector.head.class_parameters()]
        _log.warning("%s: has other classes; reinitialized: %s", source, ", ".join(reinitialized))
        state = {name: own[name] if name in reinitialized else value for name, value in state.items()}
    check_names(source, state, {name: value.shape for name, value in own.items()})
    check_weights(state, source)
    detector.load_state_dict(state)


def check_same_model(checkpoint: Mapping[str, Any], settings: ModelSettings, source: str) -> None:
    """Raise :class:`UserError` unless a checkpoint's weights can be used in a model with ``settings``.

    Args:
        checkpoint: content of a checkpoint of ``train`` or ``convert``.
        settings: settings of the model to load into. Those with the role training or inference may differ.
        source: the argument and file, for messages.
    """
    theirs, ours = stored_settings(checkpoint, source).architecture(), settings.architecture()
    differences = [
        f"{key} is {shown(theirs.get(key))} in the checkpoint and {shown(ours.get(key))} in this model"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise UserError(f"{source}: is a checkpoint of another model; {'; '.join(differences)}")


def stored_settings(checkpoint: Mapping[str, Any], source: str, **overrides: Any) -> ModelSettings:
    """The model settings of a checkpoint.

    Args:
        checkpoint: content of a checkpoint of ``train`` or ``convert``.
        source: the argument and file, for messages.
        **overrides: options that replace the checkpoint's.

    Raises:
        ArgumentError: an override is invalid.
        UserError: the stored settings are invalid.
    """
    options = dict(checkpoint["hyper_parameters"]["model"])
    try:
        return ModelSettings.from_options(**{**options, **overrides})
    except ArgumentError as error:
        if error.argument in overrides:
            raise
        raise UserError(f"{source}: {error}") from None
    except TypeError as error:
        raise UserError(f"{source}: its model settings are damaged ({error})") from None
