"""The estimate of the memory of a training step."""

import pytest

from cpm_rcnn.models.activation_memory import _TEMPORARY, StepMemory, _saved_bytes, estimate_step_memory
from cpm_rcnn.models.build import build_detector
from small_models import SMALL


def test_the_estimate_holds_at_other_sizes():
    model = build_detector(**SMALL).train()
    step = estimate_step_memory(model)
    for side in (256, 512):
        counted = _saved_bytes(model, side) * (1 + _TEMPORARY)
        assert step.per_image + step.per_pixel * side**2 == pytest.approx(counted, rel=0.05)
    assert step.fixed == 16 * sum(parameter.numel() for parameter in model.parameters())


def test_as_many_images_as_fit():
    step = StepMemory(fixed=1e9, per_image=1e6, per_pixel=100)
    assert step.images(10_000, memory=2_000_000_000) == 350
    assert step.images(10_000, memory=1_000_000_000) == 0
