"""Cost model of a training on COCO: hours on 1 to 64 GPUs from counted operations and assumed speeds.

    python benchmarks/scaling.py [--backbones r50 r101 x101_dcn]

Counted on this machine, with one training step of each model on the CPU: floating-point operations of an image
(``torch.utils.flop_counter``; a multiplication with an addition is two), parameters, and bytes of gradient per step.
Every image has 96 objects, so that each grid stage trains on the most RoIs that it can get: an upper bound.

Assumed, and options of this script: speed of the GPU and the part of it that is reached, bandwidth of a process in an
all-reduce within and between machines, images per second and core of the loader, and cores per GPU.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from cpm_rcnn.models.build import build_detector
from cpm_rcnn.ops import deform_conv_op

DEFORM = {"deformable_stages": [3, 4, 5]}
BACKBONES: dict[str, dict[str, Any]] = {
    "r50": {"name": "resnet50"},
    "r101": {"name": "resnet101"},
    "x101_dcn": {"name": "resnext101_64x4d", **DEFORM},
}
HEIGHT, WIDTH, OBJECTS, CLASSES = 800, 1216, 96, 80
# The paper's 2x schedule: 180,000 steps of 16 images, two images on each GPU.
IMAGES, PER_DEVICE = 180_000 * 16, 2
GPUS_PER_MACHINE = 8


def _products(input_shape: Any, offset_shape: Any, mask_shape: Any, weight_shape: Any) -> int:
    """Operations of the forward pass of a deformable convolution, without its sampling."""
    out, per_group, kernel_height, kernel_width = weight_shape
    positions = input_shape[0] * offset_shape[2] * offset_shape[3]
    return 2 * positions * out * per_group * kernel_height * kernel_width


def _forward(input_shape: Any, offset: Any, mask: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _products(input_shape, offset, mask, weight)


def _backward(grad: Any, input_shape: Any, offset: Any, mask: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _products(input_shape, offset, mask, weight)


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.cpm_rcnn.deform_conv2d: _forward,
    torch.ops.cpm_rcnn.deform_conv2d_backward: _backward,
}
assert deform_conv_op  # registers these operators


def count(backbone: str) -> tuple[dict[str, float], float, float]:
    """Operations of one image, forward by part and of a step, and trained parameters."""
    torch.manual_seed(0)
    model = build_detector({"frozen_stages": 2, **BACKBONES[backbone]}, num_classes=CLASSES).train()
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    sides = 16 + 160 * torch.rand(OBJECTS, 2)
    corners = torch.rand(OBJECTS, 2) * (torch.tensor([WIDTH, HEIGHT]) - sides)
    labels = torch.randint(1, CLASSES + 1, (OBJECTS,))
    targets = [{"boxes": torch.cat([corners, corners + sides], 1), "labels": labels}]

    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as forward:
        losses = model([image], targets)
    by_module = {name: float(sum(ops.values())) for name, ops in forward.get_flop_counts().items()}
    root = type(model).__name__
    parts = {"backbone": by_module[f"{root}.backbone.body"], "FPN": by_module[f"{root}.backbone.fpn"]}
    parts["RPN"] = by_module[f"{root}.rpn"]
    parts["RoI head"] = by_module["Global"] - sum(parts.values())
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as backward:
        torch.stack(list(losses.values())).sum().backward()
    step = by_module["Global"] + float(sum(backward.get_flop_counts()["Global"].values()))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return parts, step, float(trained)


def show_counts(counts: dict[str, tuple[dict[str, float], float, float]]) -> None:
    """Print what was counted."""
    table = Table(title=f"counted, {HEIGHT} x {WIDTH}, {OBJECTS} objects; GFLOP of one image", title_justify="left")
    for column in ("backbone", "C2..C5", "FPN", "RPN", "RoI head", "forward", "step", "M trained", "MB sent"):
        table.add_column(column, justify="left" if column == "backbone" else "right")
    for name, (parts, step, trained) in counts.items():
        values = [*parts.values(), sum(parts.values()), step]
        gradient = (f"{trained / 1e6:.1f}", f"{4 * trained / 1e6:.0f}")
        table.add_row(name, *(f"{value / 1e9:.0f}" for value in values), *gradient)
    Console(width=120).print(table)


def show_times(counts: dict[str, tuple[dict[str, float], float, float]], options: argparse.Namespace) -> None:
    """Print the estimates."""
    speed = options.teraflops * 1e12 * options.utilization
    title = (
        f"estimated, ms per step of {PER_DEVICE} images per GPU; {options.teraflops:g} TFLOP/s x "
        f"{options.utilization:g}, all-reduce {options.within:g} GB/s in and {options.between:g} GB/s between machines"
    )
    table = Table(title=title, title_justify="left")
    for column in (
        "backbone",
        "GPUs",
        "compute",
        "all-reduce",
        "not hidden",
        "loader",
        "step",
        "images/s",
        "2x, hours",
    ):
        table.add_column(column, justify="left" if column == "backbone" else "right")
    for name, (_, step, trained) in counts.items():
        for devices in options.devices:
            compute = PER_DEVICE * step / speed
            bandwidth = options.within if devices <= GPUS_PER_MACHINE else options.between
            reduce = 2 * (devices - 1) / devices * 4 * trained / (bandwidth * 1e9)
            # DDP sends gradients during the backward pass, about two thirds of the computation.
            exposed = max(0.0, reduce - 2 / 3 * compute)
            loader = PER_DEVICE / (options.images_per_core * options.cores)
            total = max(compute + exposed, loader)
            rate = devices * PER_DEVICE / total
            milliseconds = (f"{1e3 * value:.0f}" for value in (compute, reduce, exposed, loader, total))
            table.add_row(name, str(devices), *milliseconds, f"{rate:.0f}", f"{IMAGES / rate / 3600:.1f}")
    Console(width=140).print(table)


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--teraflops", type=float, default=495, help="of one GPU; H100 SXM in TF32, dense: 495")
    parser.add_argument("--utilization", type=float, default=0.15, help="part of it that is reached")
    parser.add_argument("--within", type=float, default=300, help="GB/s of an all-reduce within a machine")
    parser.add_argument("--between", type=float, default=40, help="GB/s of an all-reduce between machines")
    parser.add_argument("--images-per-core", type=float, default=100, help="images/s that a core loads")
    parser.add_argument("--cores", type=float, default=8, help="cores of the loader per GPU")
    options = parser.parse_args()
    counts = {backbone: count(backbone) for backbone in options.backbones}
    show_counts(counts)
    show_times(counts, options)


if __name__ == "__main__":
    main()
