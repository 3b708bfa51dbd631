"""Compare this project's deformable convolution with torchvision's operator on the shapes of X-101.

python benchmarks/deform_conv.py [--device cpu|cuda] [--quick]

Each line of the output is one shape and shows:

- The time in milliseconds (minimum over repeats) of torchvision in float32 and of this project's kernels in float32
  and bfloat16, with the ratios. torchvision is not measured in half precision, in which it does not train.
- The rates that the float32 kernel reaches, as fractions of rates measured in the same run: GB/s of a copy, counting
  the bytes of inputs and outputs, and FLOP/s of a matrix product, counting sampling and product.
- The peak memory that a call allocates in addition to its inputs and outputs, as a fraction of the whole column matrix.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from cpm_rcnn.ops import deform_conv2d

GROUPS = 64
LAYERS = {"C3": (512, 100, 168), "C4": (1024, 50, 84), "C5": (2048, 25, 42)}


class Case(NamedTuple):
    """One line of the table: a layer of X-101, the batch size, the stride, and whether there is a mask (v2)."""

    layer: str
    batch: int
    stride: int
    masked: bool


def cases(quick: bool) -> Iterator[Case]:
    for layer in LAYERS:
        for batch in (1,) if quick else (1, 2):
            for stride in (1,) if quick else (1, 2):
                for masked in (False,) if quick else (False, True):
                    yield Case(layer, batch, stride, masked)


def make(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Tensor | None], Tensor]:
    """Return input, offset, weight and mask of a case, and a gradient of its output."""
    layer, batch, stride, masked = case
    channels, height, width = LAYERS[layer]
    torch.manual_seed(0)
    h, w = (height - 1) // stride + 1, (width - 1) // stride + 1
    tensors = [
        torch.randn(batch, channels, height, width),
        torch.randn(batch, 18, h, w),
        torch.randn(channels, channels // GROUPS, 3, 3) * 0.1,
        torch.rand(batch, 9, h, w) if masked else None,
    ]
    on = [None if x is None else x.to(device, dtype).requires_grad_() for x in tensors]
    return on, torch.randn(batch, channels, h, w).to(device, dtype)


def call(function: Callable[..., Tensor], given: list[Tensor | None], stride: int, grad: Tensor | None = None) -> None:
    """Run the forward pass, and the backward pass if ``grad``, the gradient of the output, is given."""
    input, offset, weight, mask = given
    with torch.set_grad_enabled(grad is not None):
        output = function(input, offset, weight, None, stride, 1, 1, mask)
    if grad is not None:
        torch.autograd.grad(output, [x for x in given if x is not None], grad)


def best(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Return the milliseconds of the fastest of ``repeats`` calls, after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> tuple[float, dict[torch.dtype, float]]:
    """Measure the GB/s of a copy (read and write) and the GFLOP/s of a matrix product in float32 and bfloat16."""
    buffer = torch.empty(2**27, device=device)
    copied = torch.empty_like(buffer)
    gigabytes = 2 * buffer.nbytes / best(lambda: copied.copy_(buffer), device, 5) / 1e6
    size = 2048 if device == "cpu" else 8192
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device, dtype=dtype)
        flops[dtype] = 2 * size**3 / best(lambda: a @ a, device, 5) / 1e6  # noqa: B023
    return gigabytes, flops


def work_of(given: list[Tensor | None], grad: Tensor, backward: bool) -> tuple[int, int]:
    """Return the bytes that a call must read and write, and its number of floating-point operations."""
    moved = sum(x.nbytes for x in given if x is not None) + grad.nbytes
    input, _, weight, _ = given
    assert input is not None
    assert weight is not None
    channels, per_group = weight.shape[:2]
    samples = input.shape[1] * 9 * grad[:, 0].numel()
    product = 2 * channels * per_group * 9 * grad[:, 0].numel()
    # Sampling takes eight operations per value. The backward pass counts as two forward passes: it computes two
    # products, reads the tensors that forward read, and writes their gradients.
    return (3 * moved, 3 * (product + 8 * samples)) if backward else (moved, product + 8 * samples)


def measure_memory(arguments: argparse.Namespace) -> None:
    """Print the peak memory of each call in bytes, without inputs and outputs, as JSON.

    main() runs this in a separate process, so that the peaks are not affected by other measurements.
    """
    if arguments.device == "cpu":
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: return freed memory to the system at once
    peaks = {}
    for case in cases(arguments.quick):
        for name, function, dtype in implementations():
            for backward in (False, True):
                given, grad = make(case, arguments.device, dtype)
                before = reset_peak(arguments.device)
                call(function, given, case.stride, grad if backward else None)
                kept = sum(x.nbytes for x in given if x is not None) if backward else 0
                peaks[f"{tuple(case)} {name} {backward}"] = read_peak(arguments.device) - before - grad.nbytes - kept
    print(json.dumps(peaks))


def reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status("VmRSS")


def read_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def implementations() -> tuple[tuple[str, Callable[..., Tensor], torch.dtype], ...]:
    return (
        ("torchvision", torchvision.ops.deform_conv2d, torch.float32),
        ("ours", deform_conv2d, torch.float32),
        ("ours bf16", deform_conv2d, torch.bfloat16),
    )


def main(arguments: argparse.Namespace) -> None:
    device = arguments.device
    memory = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--device", device, "--memory"] + ["--quick"] * arguments.quick,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    gigabytes, flops = machine(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}: copy {gigabytes:.0f} GB/s, product {flops[torch.float32]:.0f} GFLOP/s")
    print(
        f"in float32, {flops[torch.bfloat16]:.0f} in bfloat16; 64 groups, 3x3; fwd, or fwd + backward (all gradients)\n"
    )
    columns = ["layer", "N", "stride", "", "pass", "torchvision ms", "ours ms", "ratio", "bf16 ms", "ratio"]
    columns += ["GB/s", "of copy", "GFLOP/s", "of product", "plain conv ms", "memory torchvision", "ours", "bf16"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for case in cases(arguments.quick):
        layer, batch, stride, masked = case
        column = 4 * LAYERS[layer][0] * 9
        for backward in (False, True):
            times = []
            for _, function, dtype in implementations():
                given, grad = make(case, device, dtype)
                repeats = 2 if function is not deform_conv2d and device == "cpu" else 7
                times.append(best(lambda: call(function, given, stride, grad if backward else None), device, repeats))  # noqa: B023
            given, grad = make(case, device, torch.float32)
            moved, operations = work_of(given, grad, backward)
            plain = best(lambda: convolve(given, stride, grad if backward else None), device, 5)  # noqa: B023
            theirs, ours, half = times
            shares = [
                memory[f"{tuple(case)} {name} {backward}"] / (column * grad[:, 0].numel())
                for name, _, _ in implementations()
            ]
            cells = [layer, batch, stride, "v2" if masked else "v1", "fwd + bwd" if backward else "fwd"]
            cells += [f"{theirs:.1f}", f"{ours:.2f}", f"{theirs / ours:.1f}", f"{half:.2f}", f"{theirs / half:.1f}"]
            cells += [f"{moved / ours / 1e6:.1f}", f"{moved / ours / 1e6 / gigabytes:.0%}"]
            cells += [f"{operations / ours / 1e6:.0f}", f"{operations / ours / 1e6 / flops[torch.float32]:.0%}"]
            cells += [f"{plain:.1f}", *(f"{share:.2f}" for share in shares)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def convolve(given: list[Tensor | None], stride: int, grad: Tensor | None) -> None:
    input, _, weight, _ = given
    assert input is not None
    assert weight is not None
    with torch.set_grad_enabled(grad is not None):
        output = torch.nn.functional.conv2d(input, weight, None, stride, 1, 1, GROUPS)
    if grad is not None:
        torch.autograd.grad(output, [input, weight], grad)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one image, stride 1, v1")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    measure_memory(options) if options.memory else main(options)
