"""How much memory a training step needs, to choose the number of images of a device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpm_rcnn.models.detector import TwoStageDetector

# Gradients of activations and temporary tensors, as a share of what autograd saves; the share of a device's memory that
# is used; bytes per weight: itself, its gradient and two averages of the optimizer, float32 each.
_TEMPORARY, _USED, _PER_WEIGHT = 0.4, 0.85, 16
_SIDES = (192, 384)
_OBJECTS = 100


@dataclass(frozen=True)
class StepMemory:
    """An estimate of the memory of a training step, in bytes.

    Attributes:
        fixed: of the weights, their gradients and the optimizer.
        per_image: of an image, whatever its size.
        per_pixel: of a pixel of an image.
    """

    fixed: float
    per_image: float
    per_pixel: float

    def images(self, pixels: int, memory: int) -> int:
        """The number of images of ``pixels`` pixels each that fit into ``memory`` bytes; it may be 0."""
        free = _USED * memory - self.fixed
        return max(0, int(free / (self.per_image + self.per_pixel * pixels)))


def estimate_step_memory(model: TwoStageDetector) -> StepMemory:
    """Count what autograd saves in two forward passes over noise with many objects, and extrapolate linearly.

    The count is of float32; autocast needs less. It takes seconds on a CPU.

    Args:
        model: a model on the CPU, in train mode.
    """
    small, large = (_saved_bytes(model, side) * (1 + _TEMPORARY) for side in _SIDES)
    per_pixel = (large - small) / (_SIDES[1] ** 2 - _SIDES[0] ** 2)
    fixed = _PER_WEIGHT * sum(parameter.numel() for parameter in model.parameters())
    return StepMemory(fixed, max(0.0, small - per_pixel * _SIDES[0] ** 2), per_pixel)


def _saved_bytes(model: TwoStageDetector, side: int) -> int:
    """Bytes that autograd keeps for the backward pass of one image, each storage counted once."""
    saved: dict[int, torch.UntypedStorage] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Kept, so that no later storage gets the same address.
            saved[storage.data_ptr()] = storage
        return tensor

    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)
    corners = torch.rand(_OBJECTS, 2, generator=generator) * side * 0.7
    boxes = torch.cat([corners, corners + side * 0.25], dim=1)
    target = {"boxes": boxes, "labels": torch.ones(_OBJECTS, dtype=torch.int64)}
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model([image], [target])
    return sum(storage.nbytes() for storage in saved.values())
