"""Compare this project's 3x3 convolution on a CPU with torch's: the layers of a detector, errors, and whole models.

    python benchmarks/conv3x3.py [--rounds N] [--threads N]
    python benchmarks/conv3x3.py --errors
    python benchmarks/conv3x3.py --sizes
    python benchmarks/conv3x3.py --models [--rounds N]

In each round all implementations run once, one after the other, so that other load on the machine affects all of them.
Times are the shortest of all rounds; a ratio is the median over the rounds of torch's time divided by that of
``conv3x3``. Inputs are channels-last, with which torch's convolution is fastest. ``backward`` computes the gradients of
input, weight and bias.

- Without an option: the layers of R-50 with FPN for an image of 800 x 1216, and of the grid stages for 100 RoIs (test)
  and 64 (training).
- ``--errors``: root mean square and maximum of the error against float64, both relative to the root mean square of the
  exact values.
- ``--sizes``: the gain by number of channels and outputs, with the kernel wherever it works.
- ``--models``: training step and inference of the paper's model, as in ``benchmarks/steps.py``, with and without the
  kernel.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import steps
from cpm_rcnn.ops import conv3x3 as module
from cpm_rcnn.ops.conv3x3 import conv3x3

# images, channels, height, width; outputs have the same number of channels
LAYERS = {
    "grid stage, 100 RoIs": (100, 576, 7, 7),
    "grid stage, 64 RoIs": (64, 576, 7, 7),
    "FPN and RPN, P2": (1, 256, 200, 304),
    "FPN and RPN, P3": (1, 256, 100, 152),
    "FPN and RPN, P4": (1, 256, 50, 76),
    "FPN and RPN, P5": (1, 256, 25, 38),
    "RPN, P6": (1, 256, 13, 19),
    "ResNet, C2": (1, 64, 200, 304),
    "ResNet, C3": (1, 128, 100, 152),
    "ResNet, C4": (1, 256, 50, 76),
    "ResNet, C5": (1, 512, 25, 38),
}
ERRORS = {"64": (4, 64, 28, 28), "256": (4, 256, 28, 28), "576": (16, 576, 7, 7)}
SIZES = [(1, 7, 7), (2, 7, 7), (4, 7, 7), (6, 7, 7), (16, 7, 7), (1, 16, 16), (1, 50, 76), (64, 2, 2), (64, 3, 3)]
CHANNELS = [32, 64, 128, 256, 576]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Work(NamedTuple):
    """Two functions without arguments that are timed."""

    forward: Callable[[], Tensor]
    backward: Callable[[], Sequence[Tensor]]


def convolution(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same function by torch's convolution."""
    return F.conv2d(input, weight, bias, padding=1)


def tensors(images: int, channels: int, height: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Input, weight, bias and gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (images, channels, height, width),
        (channels, channels, 3, 3),
        (channels,),
        (images, channels, height, width),
    ]
    made = [torch.randn(size, generator=generator) for size in sizes]
    made[1] /= (9 * channels) ** 0.5
    x, weight, bias, grad = (each.to(dtype) for each in made)
    x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad))
    return [x, weight, bias, grad]


def work(function: Callable[..., Tensor], given: Sequence[Tensor]) -> Work:
    """Forward and backward pass of a function."""
    *arguments, grad = given
    leaves = [x.detach().requires_grad_() for x in arguments]
    output = function(*leaves)
    return Work(lambda: function(*arguments), lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True))


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> list[str]:
    """The cells of one line: milliseconds of both implementations and the ratio, forward and backward."""
    given = tensors(*shape, dtype)
    ours, theirs = work(conv3x3, given), work(convolution, given)
    cells = []
    for mine, other in zip(ours, theirs):
        times = [(seconds(mine), seconds(other)) for _ in range(rounds + 1)][1:]
        ratio = statistics.median(b / a for a, b in times)
        cells += [f"{1e3 * min(column):.2f}" for column in zip(*times)] + [f"{ratio:.2f}"]
    return cells


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    for line in (columns, ["---"] * len(columns), *lines):
        print("| " + " | ".join(line) + " |", flush=True)


def layers(rounds: int) -> None:
    """Print the times of the layers."""
    columns = ["layer", "dtype", "conv3x3 ms", "conv2d ms", "ratio", "backward ms", "conv2d's ms", "ratio"]
    table(columns, [
        [name, dtype, *compare(shape, DTYPES[dtype], rounds)] for name, shape in LAYERS.items() for dtype in DTYPES
    ])  # fmt: skip


def errors() -> None:
    """Print the errors of outputs and gradients, as root mean square / maximum."""
    lines = []
    for channels, shape in ERRORS.items():
        for name, dtype in DTYPES.items():
            given = tensors(*shape, dtype)
            exact, ours, theirs = (
                (each.forward(), *each.backward()[:2])
                for each in (
                    work(convolution, [x.double() for x in given]), work(conv3x3, given), work(convolution, given)
                )
            )  # fmt: skip
            cells = []
            for results in zip(exact, ours, theirs):
                right, *found = (x.detach().double() for x in results)
                scale = right.square().mean().sqrt()
                wrong = [(x - right) / scale for x in found]
                cells += [f"{x.square().mean().sqrt().item():.1e} / {x.abs().max().item():.1e}" for x in wrong]
            lines.append([channels, name, *cells])
    pairs = [
        f"{what}, {who}"
        for what in ("output", "input's gradient", "weight's gradient")
        for who in ("conv3x3", "conv2d")
    ]
    table(["channels", "dtype", *pairs], lines)


def sizes(rounds: int) -> None:
    """Print the gains of forward / backward by number of channels and outputs."""
    module._MIN_CHANNELS, module._MIN_POSITIONS, module._MIN_SIDE = 32, 1, 1
    lines = []
    for images, height, width in SIZES:
        cells = [compare((images, count, height, width), torch.float32, rounds) for count in CHANNELS]
        outputs = images * height * width
        lines.append([f"{images} x {height} x {width}", str(outputs), *(f"{cell[2]} / {cell[5]}" for cell in cells)])
    table(["images", "outputs", *(f"{count} channels" for count in CHANNELS)], lines)


def models(rounds: int) -> None:
    """Print the times of the paper's model with and without the kernel."""
    size = {"size": (800, 1216), "batch": 1, "objects": 64, "candidates": 1000}
    options = argparse.Namespace(**size, device="cpu", optimize=False, compile=False)
    step, infer, _ = steps.prepare("cpm", options)
    lines = []
    enough = module._MIN_POSITIONS
    for name, dtype in {"float32": None, "bf16 autocast": torch.bfloat16}.items():
        for what, call in {"training step": step, "inference": infer}.items():
            times = []
            for _ in range(rounds + 1):
                pair = []
                for module._MIN_POSITIONS in (enough, 1 << 60):
                    pair.append(steps.timed(call, dtype, "cpu"))
                times.append(pair)
            ratio = statistics.median(b / a for a, b in times[1:])
            lines.append([what, name, *(f"{min(column):.2f}" for column in zip(*times[1:])), f"{ratio:.2f}"])
    table(["work", "precision", "with conv3x3 s", "without s", "ratio"], lines)


def main(arguments: argparse.Namespace) -> None:
    """Print one table."""
    torch.set_num_threads(arguments.threads)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{capability}, torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds\n")
    if arguments.errors:
        errors()
    elif arguments.sizes:
        sizes(arguments.rounds)
    elif arguments.models:
        models(arguments.rounds)
    else:
        layers(arguments.rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--errors", action="store_true")
    choice.add_argument("--sizes", action="store_true")
    choice.add_argument("--models", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    main(parser.parse_args())
