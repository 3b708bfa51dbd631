"""The detector that a training starts from: a checkpoint of this project, or a file of another program."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from cpm_rcnn.models.finite import check_weights
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.weights.checkpoints import check_checkpoint, checkpoint_file, class_names, detector_state, stored_settings
from cpm_rcnn.weights.detectors import convert_content, convert_download
from cpm_rcnn.weights.reading import read_file


@dataclass(frozen=True)
class StartingDetector:
    """A trained detector by this project's names.

    Attributes:
        source: the argument and file, for messages.
        settings: settings of its model.
        class_names: names of its classes 1..C; empty if the file does not tell them.
        num_classes: number C of its classes.
        state: its weights.
        notes: what the user should know about the file, one line each.
    """

    source: str
    settings: ModelSettings
    class_names: list[str]
    num_classes: int
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_starting_detector(init: Any) -> StartingDetector:
    """The detector in a file.

    Args:
        init: a checkpoint of ``train`` or ``convert``, a run's folder, a file that ``convert`` can read, or
            ``torchvision:NAME``.

    Raises:
        UserError: the file does not exist, is damaged, or is of no known program or kind of model, or its weights are
            not finite.
    """
    source = f"init={init}"
    converted = convert_download(init, source)
    if converted is None:
        path: str | Path = checkpoint_file(init, "init")
        content = read_file(path, "init")
        if isinstance(content, dict) and "hyper_parameters" in content:
            check_checkpoint(content, source)
            names, state = class_names(content), detector_state(content)
            check_weights(state, source)
            return StartingDetector(source, stored_settings(content, source), names, len(names), state)
        converted = convert_content(content, path, "init")
    categories = converted.categories
    if categories is None and converted.num_classes == len(COCO_CATEGORIES):
        categories = COCO_CATEGORIES
    return StartingDetector(
        source,
        converted.settings,
        [category["name"] for category in categories or ()],
        converted.num_classes,
        converted.state,
        (converted.description, *converted.notes),
    )
