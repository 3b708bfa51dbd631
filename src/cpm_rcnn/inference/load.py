"""Load a detector from a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.inference.detector import SIZE_OPTIONS, Detector, size_arguments
from cpm_rcnn.inference.multi_scale import MultiScaleSettings
from cpm_rcnn.models.build import build
from cpm_rcnn.models.finite import check_weights
from cpm_rcnn.models.heads import HEADS
from cpm_rcnn.models.settings import inference_options
from cpm_rcnn.weights.checkpoints import detector_state, read_checkpoint, stored_operating_points, stored_settings
from cpm_rcnn.weights.reading import check_names


def load(path: str | Path, **overrides: Any) -> Detector:
    """The detector of a checkpoint that ``train`` or ``convert`` wrote, in eval mode on the CPU.

    Args:
        path: the checkpoint.
        **overrides: test-time settings that replace the checkpoint's: those of the model (for example
            ``score_threshold=0.05``, ``nms_iou``, ``proposals_test``, ``test_stages``), ``ism=False`` or ``rsm=False``,
            ``test_short_side`` (None keeps the original size) and ``test_max_size`` in pixels, ``tile`` (None detects
            in whole images) and ``tile_overlap``, and ``multi_scale``, a
            :class:`~cpm_rcnn.inference.multi_scale.MultiScaleSettings`.

    Raises:
        ArgumentError: an override is unknown or its value invalid.
        UserError: the file does not exist, is damaged, is a checkpoint of another program or format, or its weights are
            not finite.
    """
    checkpoint = read_checkpoint(path, "path")
    return detector_from(checkpoint, f"path={path}", **overrides)


def overrides_of_load() -> list[str]:
    """Names of the settings that :func:`load` can override, over all heads, without ``multi_scale``."""
    return [*inference_options(), *SIZE_OPTIONS]


def detector_from(
    checkpoint: Mapping[str, Any], source: str, *, multi_scale: MultiScaleSettings | None = None, **overrides: Any
) -> Detector:
    """The detector in a checkpoint that has been read; see :func:`load`.

    Args:
        checkpoint: content of the checkpoint, as :func:`~cpm_rcnn.weights.checkpoints.read_checkpoint` returns it.
        source: the argument and file, for messages.
        multi_scale: settings of the multi-scale test; None tests at one scale.
        **overrides: test-time settings that replace the checkpoint's.
    """
    if multi_scale is not None and not isinstance(multi_scale, MultiScaleSettings):
        raise ArgumentError("multi_scale", f"={multi_scale}: must be MultiScaleSettings or None")
    for name in overrides:
        if name not in overrides_of_load():
            raise ArgumentError(
                name, f"={overrides[name]}: not a test-time setting; allowed: {', '.join(overrides_of_load())}"
            )
    hyper_parameters = checkpoint["hyper_parameters"]
    sizes = hyper_parameters["data"] | {name: overrides.pop(name) for name in SIZE_OPTIONS if name in overrides}
    settings = stored_settings(checkpoint, source, **overrides)
    model = build(settings, len(hyper_parameters["categories"]))
    state = detector_state(checkpoint)
    for name in HEADS[settings.trunk.head].optional_parts:
        if overrides.get(name) is False:
            state = {key: value for key, value in state.items() if not key.startswith(f"head.{name}.")}
    check_names(source, state, {name: value.shape for name, value in model.state_dict().items()})
    check_weights(state, source)
    model.load_state_dict(state)
    points = stored_operating_points(checkpoint, source)
    sizes = size_arguments(sizes)
    return Detector(
        model.eval(), hyper_parameters["categories"], multi_scale=multi_scale, operating_points=points, **sizes
    )
