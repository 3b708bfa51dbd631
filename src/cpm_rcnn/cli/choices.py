"""The values of options that are ``auto``: rules from the data and the devices of a training to numbers."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cpm_rcnn.cli.nodes import AUTO
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.models.activation_memory import StepMemory

# Nine of ten objects get at least this mean side in pixels at the network's size.
_OBJECT_SIDE = 40
# The shorter side in pixels, on CPU and GPU.
_SHORT_SIDES = {False: (224, 480), True: (320, 800)}
# Images per step, on CPU and GPU.
_IMAGES_PER_STEP = {False: 4, True: 16}
# AdamW's learning rate with 4 images per step.
_ADAMW_RATE = 3e-4
_SGD_BASE_RATE = 0.02
# Numbers of training images from which one stage less is frozen than stem and C2.
_UNFREEZE = (2000, 20_000)


class Choice(NamedTuple):
    """A value for an option that is ``auto``."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Facts:
    """What the choices depend on.

    Attributes:
        images: number of training images with objects.
        short_side: median of the shorter sides of these images in pixels.
        aspect: 95th percentile of longer side over shorter side.
        object_side: 10th percentile of the objects' sides, the square root of the area of the box, over the shorter
            side of the image.
        objects: 99th percentile of the number of objects of an image.
        devices: number of devices of the training.
        gpu: whether they are GPUs.
        accumulated: batches of a device per optimizer step.
        memory: bytes of each device's memory, and what a step needs; None if the memory does not limit the images.
        optimizer: ``sgd`` or ``adamw``.
        freezable: how many of the backbone's stages can be frozen, at most 2; 0 if it has no pretrained weights.
    """

    images: int
    short_side: float
    aspect: float
    object_side: float
    objects: float
    devices: int
    gpu: bool
    accumulated: int
    memory: tuple[int, StepMemory] | None
    optimizer: str
    freezable: int

    @classmethod
    def of(cls, annotations: CocoAnnotations, **others: Any) -> "Facts":
        """The facts of training annotations, which have at least one usable object, and ``others``."""
        rows = annotations.images_with_objects()
        sides = np.stack([annotations.heights[rows], annotations.widths[rows]]).astype(np.float64)
        short, long = sides.min(axis=0), sides.max(axis=0)
        image_rows = annotations.image_rows[annotations.usable]
        boxes = annotations.xywh[annotations.usable]
        object_sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
        image_sides = np.minimum(annotations.heights, annotations.widths)[image_rows]
        counts = np.bincount(image_rows, minlength=len(annotations))[rows]
        return cls(
            images=len(rows),
            short_side=float(np.median(short)),
            aspect=float(np.percentile(long / short, 95)),
            object_side=float(np.percentile(object_sides / image_sides, 10)),
            objects=float(np.percentile(counts, 99)),
            **others,
        )


def choose(facts: Facts, values: Mapping[str, Any]) -> Iterator[Choice]:
    """The values of the options that are ``auto``, each after those it depends on.

    Args:
        facts: what they depend on.
        values: the values of all options of :data:`~cpm_rcnn.cli.nodes.PROVISIONAL` by key.
    """
    chosen = dict(values)
    for key, rule in _RULES.items():
        if chosen[key] == AUTO:
            chosen[key], reason = rule(facts, chosen)
            yield Choice(key, chosen[key], reason)


def _short_sides(facts: Facts, chosen: Mapping[str, Any]) -> tuple[list[int], str]:
    low, high = _SHORT_SIDES[facts.gpu]
    wanted = _OBJECT_SIDE / facts.object_side
    if facts.gpu:
        # There, larger images cost little, and images of their own size lose nothing.
        wanted = max(wanted, facts.short_side)
    side = int(min(max(_multiple(wanted, 32), low), high))
    tenth = facts.object_side * side
    return [side], f"images of {facts.short_side:.0f} px; nine of ten objects are at least {tenth:.0f} px there"


def _max_size(facts: Facts, chosen: Mapping[str, Any]) -> tuple[int, str]:
    aspect = min(facts.aspect, 2.0)
    return _multiple(max(chosen["schedule.short_sides"]) * aspect, 32), f"for sides of 1 to {aspect:.2g}"


def _test_short_side(facts: Facts, chosen: Mapping[str, Any]) -> tuple[int, str]:
    return max(chosen["schedule.short_sides"]), "as in training"


def _test_max_size(facts: Facts, chosen: Mapping[str, Any]) -> tuple[int, str]:
    return max(chosen["schedule.max_size"], chosen["schedule.test_short_side"] or 0), "as in training"


def _images_per_device(facts: Facts, chosen: Mapping[str, Any]) -> tuple[int, str]:
    per_step = _IMAGES_PER_STEP[facts.gpu]
    parts = facts.devices * facts.accumulated
    share = max(1, min(per_step, facts.images) // parts)
    limit = ""
    if facts.memory is not None:
        memory, step = facts.memory
        fitting = max(1, step.images(max(chosen["schedule.short_sides"]) * chosen["schedule.max_size"], memory))
        if fitting < share:
            share, limit = fitting, f"; more do not fit into {memory / 2**30:.0f} GiB"
    return share, f"{share * parts} per step{limit}"


def _base_lr(facts: Facts, chosen: Mapping[str, Any]) -> tuple[float, str]:
    if facts.optimizer == "sgd":
        return _SGD_BASE_RATE, "the paper's, for 16 images per step"
    per_step = chosen["schedule.images_per_device"] * facts.devices * facts.accumulated
    # The root instead of Schedule's linear scaling suits Adam (arXiv 2205.10287).
    rate = _ADAMW_RATE * math.sqrt(per_step / 4)
    return float(f"{rate * 16 / per_step:.3g}"), f"with {per_step} images per step, AdamW's learning rate is {rate:.2g}"


def _proposals_train(facts: Facts, chosen: Mapping[str, Any]) -> tuple[int, str]:
    return _proposals(facts, 32, 500, 2000)


def _proposals_test(facts: Facts, chosen: Mapping[str, Any]) -> tuple[int, str]:
    return _proposals(facts, 16, 300, 1000)


def _proposals(facts: Facts, per_object: int, low: int, high: int) -> tuple[int, str]:
    number = min(max(_multiple(per_object * facts.objects, 100), low), high)
    return number, f"images have up to {facts.objects:.0f} objects"


def _frozen_stages(facts: Facts, chosen: Mapping[str, Any]) -> tuple[int, str]:
    if facts.freezable == 0:
        return 0, "the backbone has no pretrained weights"
    return min(facts.freezable, sum(facts.images < limit for limit in _UNFREEZE)), f"{facts.images} images"


def _multiple(value: float, step: int) -> int:
    """The smallest multiple of ``step`` that is at least ``value``, but for rounding errors."""
    return math.ceil(value / step - 1e-9) * step


# One for each of PROVISIONAL, after those whose choice it depends on.
_RULES: Mapping[str, Callable[[Facts, Mapping[str, Any]], tuple[Any, str]]] = {
    "schedule.short_sides": _short_sides,
    "schedule.max_size": _max_size,
    "schedule.test_short_side": _test_short_side,
    "schedule.test_max_size": _test_max_size,
    "schedule.images_per_device": _images_per_device,
    "schedule.base_lr": _base_lr,
    "detector.proposals_train": _proposals_train,
    "detector.proposals_test": _proposals_test,
    "backbone.frozen_stages": _frozen_stages,
}
