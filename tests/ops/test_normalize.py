"""The compiled normalization of images, compared with torch's operations."""

import pytest
import torch

from cpm_rcnn.ops import normalize
from cpm_rcnn.ops.normalize import normalize_image
from ops import normalize_sweep
from ops.sweep_script import check_other_instruction_sets

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))


def all_values():
    """An image (3, 16, 16) that has every value in every channel."""
    return torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1).contiguous()


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("threads", [1, 3])
def test_random_cases_equal_torch_to_the_last_bit(threads, set_threads):
    set_threads(threads)
    assert not normalize_sweep.run(range(300))


@pytest.mark.usefixtures("cpu_kernels")
def test_random_cases_equal_torch_for_every_other_instruction_set():
    check_other_instruction_sets(normalize_sweep.__file__, 300)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_value_of_every_channel_is_normalized_by_the_mean_and_std_of_its_output(reverse, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(normalize, "load_cpu_kernel", lambda: False)
    image = all_values()
    image[1], image[2] = image[1].flip(0), image[2].t().clone()
    out = torch.empty(3, 16, 16)
    normalize_image(image, MEAN, STD, out, reverse=reverse)
    for channel in range(3):
        source = image[2 - channel if reverse else channel]
        assert torch.equal(out[channel], (source - MEAN[channel]) / STD[channel])


def test_other_dtypes_are_left_to_torch():
    out = torch.empty(3, 16, 16, dtype=torch.float64)
    normalize_image(all_values(), MEAN.double(), STD.double(), out)
    assert torch.equal(out, (all_values() - MEAN.double()) / STD.double())


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda i, m, s, o: (i[0], m, s, False, o), r"image must be \(3, H, W\)"),
        (lambda i, m, s, o: (i.float(), m, s, False, o), "image must be uint8, got Float"),
        (lambda i, m, s, o: (i, m, s, False, o[:, 1:]), "out must have the shape of the image"),
        (lambda i, m, s, o: (i, m, s, False, o.transpose(1, 2)), "out must have .* contiguous rows"),
        (lambda i, m, s, o: (i, m[:2], s, False, o), "mean and std must have 3 values"),
        (lambda i, m, s, o: (i, m, s, False, o.double()), "must be float32"),
    ],
)
def test_invalid_arguments_raise_an_error(broken, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cpm_rcnn_cpu.normalize_image(*broken(all_values(), MEAN, STD, torch.empty(3, 16, 16)))
