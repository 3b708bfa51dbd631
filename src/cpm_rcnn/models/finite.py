"""Checks that weights, and outputs at test, are finite; their errors name the first part that is not.

They are not used in the training step.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.host import exporting, reads_are_free, require


def check_weights(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise :class:`UserError` unless all ``weights`` are finite; waits for the device.

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

    In a test on an accelerator, the error is raised when the host next reads from the device
    (:func:`~cpm_rcnn.models.host.requirements_deferred`). An exported graph does not check it.

    Args:
        part: name of the module in the model.
        module: its weights are checked to find out why its output is not finite.
        outputs: floating point, of any shape.
    """
    # A sum reads each value once, and is finite unless a value is not, or the sum itself overflows.
    sums = (output.sum(dtype=torch.float32) for output in outputs)
    if exporting():
        return
    if reads_are_free(outputs[0]) and torch.stack(list(sums)).isfinite().all():
        return
    finite = torch.stack([output.isfinite().all() for output in outputs]).all()
    require(finite, partial(_raise_nonfinite, part, module))


def _raise_nonfinite(part: str, module: nn.Module) -> None:
    check_weights({f"{part}.{name}": value for name, value in module.state_dict().items()}, f"the model's {part}")
    raise UserError(
        f"the model's {part} gives NaN or infinite values although its weights are finite: they overflow; use 32-bit "
        "precision, or weights of a training that did not diverge"
    )
