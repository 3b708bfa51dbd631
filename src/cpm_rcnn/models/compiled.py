"""torch.compile for the parts of a detector that only map tensors to tensors.

Selecting anchors, RoIs and detections, pooling and losses stay as they are: there, shapes depend on the data on a CPU,
and on an accelerator little is computed.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from cpm_rcnn.errors import check_choice

# The values of ``trainer.compile`` and the modes of torch.compile.
MODES = {"reduce-overhead": "reduce-overhead", "max": "max-autotune"}
# By default, all modules that are compiled share one cache and one limit of compilations. torch 2.11 has no other way.
_ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)
_CHAINS = (nn.Sequential, TwoMLPHead)


def compile_layers(backbone: nn.Module, rpn_head: nn.Module, head: nn.Module, mode: str | None = None) -> None:
    """Compile layers in place, at their first call; their ``state_dict`` keeps its names.

    A second shape of the input, for example another image size, compiles a layer once more, for all shapes.

    Args:
        backbone: compiled as a whole.
        rpn_head: compiled as a whole.
        head: its chains of layers (``nn.Sequential`` and torchvision's ``TwoMLPHead``) are compiled, each by itself.
        mode: a key of :data:`MODES`; both record CUDA graphs on a GPU. None is torch.compile's default mode.

    Raises:
        ArgumentError: another mode.
    """
    if mode is not None:
        check_choice("mode", mode, list(MODES))
    for part in (backbone, rpn_head, *_chains(head)):
        part.compile(mode=None if mode is None else MODES[mode], **_ISOLATED)


def _chains(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost chains in ``module``."""
    for child in module.children():
        if isinstance(child, _CHAINS):
            yield child
        else:
            yield from _chains(child)
