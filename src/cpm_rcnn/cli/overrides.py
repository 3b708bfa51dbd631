"""The settings that ``eval``, ``predict`` and ``convert`` can override, derived from the settings dataclasses.

These commands' configs have nodes ``detector`` and ``data`` in which every option is ``unset``, which means "as in the
checkpoint"; null is a value like others. The nodes are generated here, so that no option is listed by hand.
"""

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore

from cpm_rcnn.cli.config import UNSET
from cpm_rcnn.data import DataSettings
from cpm_rcnn.inference.detector import SIZE_OPTIONS
from cpm_rcnn.models.settings import inference_options


def register_overrides() -> None:
    """Register ``overrides/eval``, ``overrides/predict`` and ``overrides/convert`` for the defaults lists of conf/."""
    model = inference_options()
    nodes: dict[str, dict[str, Sequence[str]]] = {
        "eval": {"detector": model, "data": DataSettings.names("inference")},
        "predict": {"detector": model, "data": SIZE_OPTIONS},
        # A file does not say which mapping ratios its stages were trained with.
        "convert": {"detector": [*model, "stages"]},
    }
    store = ConfigStore.instance()
    for name, node in nodes.items():
        content = {key: dict.fromkeys(options, UNSET) for key, options in node.items()}
        store.store(group="overrides", name=name, node=content, package="_global_")
