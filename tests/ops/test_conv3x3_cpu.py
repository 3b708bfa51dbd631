"""The compiled CPU kernel of the 3x3 convolution, compared with torch's convolution in float64."""

import pytest
import torch

from ops import conv3x3_sweep as sweep
from ops.sweep_script import check_other_instruction_sets

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def test_random_cases_equal_torch():
    assert not sweep.run(range(60))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tiles_and_channels_equal_torch(dtype, set_threads):
    """The tiles and the channels are divided into several blocks, and the blocks among the threads."""
    set_threads(2)
    for shape in ((1, 64, 131, 126, 96), (30, 288, 7, 7, 160)):
        case = sweep.make(*shape, dtype)
        for found, expected in zip(sweep.results(case), sweep.expected_results(case)):
            assert sweep.error(found, expected) < sweep.TOLERANCE


def test_results_repeat_bit_for_bit_and_outputs_do_not_depend_on_the_threads(set_threads):
    case = sweep.make(1, 64, 131, 126, 96)
    first, *others = [(set_threads(threads), sweep.results(case), sweep.results(case))[1:] for threads in (1, 2, 3, 6)]
    for once, again in (first, *others):
        assert all(map(torch.equal, once, again))
        assert all(map(torch.equal, once[:2], first[0][:2]))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x, w, b: (x[0], w, b), r"input must be \(N, 64, H, W\)"),
        (lambda x, w, b: (x[:, :32], w, b), r"input must be \(N, 64, H, W\)"),
        (lambda x, w, b: (x, w[..., :2], b), r"weight must be \(C_out, C_in, 3, 3\)"),
        (lambda x, w, b: (x, w[:20], b), "channels must be multiples of 32"),
        (lambda x, w, b: (x, w, b[1:]), r"bias must be \(96,\)"),
        (lambda x, w, b: (x.double(), w.double(), b), "must be float32 or bfloat16"),
        (lambda x, w, b: (x, w.bfloat16(), b), "weight must be float32 or have the dtype of the other"),
    ],
)
def test_invalid_arguments_raise_an_error(broken, message):
    case = sweep.make(1, 64, 5, 5, 96)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cpm_rcnn_cpu.conv3x3(*broken(case.input, case.weight, case.bias))


def test_gradients_of_another_size_raise_an_error():
    case = sweep.make(1, 64, 5, 5, 96)
    with pytest.raises(RuntimeError, match=r"grad_output must be \(N, 96, H, W\)"):
        torch.ops.cpm_rcnn_cpu.conv3x3_grad_input(case.input, case.weight)
    with pytest.raises(RuntimeError, match=r"grad_output is .* but input is"):
        torch.ops.cpm_rcnn_cpu.conv3x3_grad_weight(case.grad_output[..., :4], case.input, torch.float32)


def test_random_cases_equal_torch_for_every_other_instruction_set():
    check_other_instruction_sets(sweep.__file__, 60)
