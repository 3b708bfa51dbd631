"""Training that starts from a detector's weights: the same model, other data or another recipe."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.backbones.build import build_body
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.training.module import DetectionModule
from cpm_rcnn.weights.checkpoints import read_checkpoint
from cpm_rcnn.weights.files import check_names

_log = logging.getLogger(__name__)

# What may differ from the starting point: how it is trained and tested, and where its own start came from.
_FREE = {
    "backbone.weights",
    "backbone.frozen_stages",
    "backbone.check_weights",
    "positive_iou",
    "loss_weight",
    "ignore_border_anchors",
    "proposals_train",
    "proposals_test",
    "samples",
    "max_grid_rois",
    "score_threshold",
    "nms_iou",
    "test_stages",
}


def start_from(module: DetectionModule, path: str) -> None:
    """Load the weights of a checkpoint into a new module.

    Layers that name classes start anew where the classes differ; all else must fit.

    Args:
        module: of the new training.
        path: a checkpoint of ``train`` or ``convert``.

    Raises:
        UserError: no such file, a damaged one, or the checkpoint of a model that differs in more than its classes.
    """
    checkpoint = read_checkpoint(path, "init")
    check_same_model(checkpoint, module, f"init={path}")
    state, own = checkpoint["state_dict"], module.state_dict()
    names = [category["name"] for category in checkpoint["hyper_parameters"]["categories"]]
    if names != module.class_names:
        anew = [name for name in own if ".predictor." in name and "ism" not in name]
        _log.warning("init=%s: other classes; %s start anew", path, ", ".join(anew))
        state = {name: own[name] if name in anew else value for name, value in state.items()}
    check_names(f"init={path}", state, {name: value.shape for name, value in own.items()})
    module.load_state_dict(state)


def check_same_model(checkpoint: Mapping[str, Any], module: DetectionModule, source: str) -> None:
    """Raise :class:`UserError` unless a checkpoint's model is that of ``module``, but for what may differ.

    Args:
        checkpoint: of ``train`` or ``convert``.
        module: of the new training.
        source: the config key and file, for messages.
    """
    theirs, ours = checkpoint["hyper_parameters"]["model"], module.hparams["model"]
    differences = [
        f"{key} is {value} there and {other} here" for key, value, other in _differences(_whole(theirs), _whole(ours))
    ]
    if differences:
        raise UserError(f"{source}: of another model; {'; '.join(differences)}")


def _whole(model: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``build_detector`` with the defaults of those that are not given."""
    return {
        **_defaults(build_detector),
        **model,
        "backbone": {**_defaults(build_body), **model["backbone"]},
    }


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key and both values of what differs between two sets of arguments of ``build_detector``, free ones left out."""
    a, b = dict(_flat("", theirs)), dict(_flat("", ours))
    for key in sorted(a.keys() | b.keys()):
        if key not in _FREE and key.rpartition(".")[2] not in _FREE and a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}".lstrip("."), inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, inner in enumerate(value):
            yield from _flat(f"{prefix}.{i}", inner)
    else:
        yield prefix, value
