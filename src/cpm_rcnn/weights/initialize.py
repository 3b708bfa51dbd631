"""Starting weights of a new training: a trained detector, or a pretrained backbone."""

from collections.abc import Sequence

from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.weights.backbone import load_backbone
from cpm_rcnn.weights.starting import StartingDetector
from cpm_rcnn.weights.transfer import Transfer, transfer


def initialize(
    detector: TwoStageDetector,
    class_names: Sequence[str] = (),
    *,
    start: StartingDetector | None = None,
    repeat_stages: bool = False,
) -> list[Transfer]:
    """Load the starting weights of a training that does not resume another.

    Without ``start``, the backbone gets the weights that its settings name, if any; all other weights stay random.

    Args:
        detector: the detector, with the random weights that it was constructed with.
        class_names: names of the detector's classes 1..C; only ``start`` needs them.
        start: a trained detector, whose weights are taken where they fit, see
            :func:`~cpm_rcnn.weights.transfer.transfer`.
        repeat_stages: whether stages that ``start`` does not have are taken from its last stage of the same kind.

    Returns:
        What happened to each part; empty without ``start``.

    Raises:
        UserError: weights of the backbone cannot be read, or do not fit.
    """
    if start is not None:
        return transfer(detector, class_names, start, repeat_stages=repeat_stages)
    if detector.settings.backbone.weights is not None:
        load_backbone(detector.backbone.body, detector.settings.backbone, detector.settings.backbone.weights)
    return []
