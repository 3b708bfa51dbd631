"""Checks that weights, and outputs at test, are finite; their errors name the first part that is not.

Both wait for the device, so they are not used in the training step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cpm_rcnn.errors import UserError


def check_weights(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise :class:`UserError` unless all ``weights`` are finite.

    Args:
        weights: parameters and buffers by name, in the order of the model.
        source: where they came from, for messages.
    """
    values = {name: value for name, value in weights.items() if value.is_floating_point()}
    if not values:
        return
    finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
    wrong = [name for name, is_finite in zip(values, finite) if not is_finite]
    if wrong:
        raise UserError(
            f"{source}: {len(wrong)} of {len(values)} tensors have NaN or infinite values, the first is {wrong[0]}; "
            "the training that wrote them diverged, use an earlier checkpoint"
        )


def check_output(part: str, module: nn.Module, *outputs: Tensor) -> None:
    """Raise :class:`UserError` unless all ``outputs`` of ``module`` are finite.

    Args:
        part: name of the module in the model.
        module: its weights are checked to find out why its output is not finite.
        outputs: floating point, of any shape.
    """
    # A sum reads each value once, and is finite unless a value is not, or the sum itself overflows.
    if torch.stack([output.sum(dtype=torch.float32) for output in outputs]).isfinite().all():
        return
    if all(output.isfinite().all() for output in outputs):
        return
    check_weights({f"{part}.{name}": value for name, value in module.state_dict().items()}, f"the model's {part}")
    raise UserError(
        f"the model's {part} gives NaN or infinite values although its weights are finite: they overflow; use 32-bit "
        "precision, or weights of a training that did not diverge"
    )
