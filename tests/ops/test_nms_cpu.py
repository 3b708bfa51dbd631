"""The compiled CPU kernel of the non-maximum suppression, compared with torchvision's operator."""

import resource

import pytest
import torch

from ops import nms_sweep
from ops.sweep_script import check_other_instruction_sets

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def nms_mask(boxes, scores, groups, iou_threshold, valid=None):
    return torch.ops.cpm_rcnn_cpu.nms_mask(boxes, scores, groups, iou_threshold, valid)


def scattered(count, groups, size=8.0, area=100.0, dtype=torch.float32):
    """Boxes of about this size, whose corners are in a square with this side."""
    generator = torch.Generator().manual_seed(count)
    corner = area * torch.rand(count, 2, generator=generator, dtype=dtype)
    boxes = torch.cat([corner, corner + size * (0.5 + torch.rand(count, 2, generator=generator, dtype=dtype))], 1)
    return boxes, torch.rand(count, generator=generator), torch.randint(groups, (count,), generator=generator)


def test_random_cases_equal_torchvision_per_group():
    assert not nms_sweep.run(nms_mask, range(600))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_number_of_threads_gives_the_result_of_torchvision(threads, dtype, set_threads):
    """The cases are many groups; one group that is divided among the threads; and a large group beside small ones."""
    set_threads(threads)
    many, one, mixed = scattered(4000, 7, dtype=dtype), scattered(2500, 1, dtype=dtype), scattered(3500, 2, dtype=dtype)
    mixed[2][:2800] = 1
    for boxes, scores, groups in (many, one, mixed):
        expected = nms_sweep.expected_mask(boxes, scores, groups, 0.3)
        assert 0.05 < expected.float().mean() < 0.6
        assert torch.equal(nms_mask(boxes, scores, groups, 0.3), expected)


def test_thousands_of_groups_equal_torchvision():
    boxes, scores, groups = scattered(6000, 2000, area=10.0)
    assert torch.equal(nms_mask(boxes, scores, groups, 0.3), nms_sweep.expected_mask(boxes, scores, groups, 0.3))


def test_memory_is_proportional_to_the_number_of_boxes():
    """A matrix of all pairs would need 1.25 GB even with one bit per pair."""
    boxes, scores, groups = scattered(100_000, 1, area=200.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mask = nms_mask(boxes, scores, groups, 0.3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    # Every kept box is the best of its neighborhood, and kept boxes do not suppress each other.
    assert 0 < mask.sum() < 5000
    assert nms_mask(boxes[mask], scores[mask], groups[mask], 0.3).all()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda b, s, g: (b[0], s, g, 0.5, None), r"boxes must be \(R, 4\)"),
        (lambda b, s, g: (b, s[1:], g, 0.5, None), r"scores must be \(50,\)"),
        (lambda b, s, g: (b, s, g, 0.5, g[1:] > 0), r"valid must be \(50,\)"),
        (lambda b, s, g: (b, s.half(), g, 0.5, None), "must be float32 or float64, got Float and Half"),
        (lambda b, s, g: (b, s, g.int(), 0.5, None), "groups must be int64"),
        (lambda b, s, g: (b, s, g, 0.5, g), "valid must be bool"),
    ],
)
def test_invalid_arguments_raise_an_error(broken, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cpm_rcnn_cpu.nms_mask(*broken(*scattered(50, 2)))


def test_random_cases_equal_torchvision_for_every_other_instruction_set():
    check_other_instruction_sets(nms_sweep.__file__, 400)
