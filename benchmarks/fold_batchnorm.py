"""Frozen BatchNorm folded into the convolutions, and Detector.optimize, compared with separate layers in one run.

    python benchmarks/fold_batchnorm.py

For a backbone with its feature pyramid it prints the median milliseconds of CPU time of a training step (forward and
backward pass; the stem and C2 are frozen) and of inference, and the ratio to separate layers. The variants take turns,
so that other load on the machine affects all of them alike.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cpm_rcnn.models.backbones import resnet
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.detector import TwoStageDetector


def separate(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    """The computation without folding: BatchNorm is a layer of its own."""
    return norm(conv(x))


def bf16() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


def training_step(
    model: TwoStageDetector, images: Tensor, autocast: Callable[[], AbstractContextManager[object]]
) -> None:
    with autocast():
        pyramid = model.backbone(images)
    loss = torch.stack([level.float().square().mean() for level in pyramid.values()]).sum()
    parameters = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    torch.autograd.grad(loss, parameters)


def inference(model: TwoStageDetector, images: Tensor, autocast: Callable[[], AbstractContextManager[object]]) -> None:
    with torch.inference_mode(), autocast():
        model.backbone(images)


def run(step: Callable[..., None], with_fold: bool, *arguments: object) -> float:
    """Milliseconds of CPU time of one step, summed over the threads; waiting for a busy core does not count."""
    fold = resnet.conv_norm
    if not with_fold:
        resnet.conv_norm = separate
    try:
        begun = time.process_time()
        step(*arguments)
        return 1e3 * (time.process_time() - begun)
    finally:
        resnet.conv_norm = fold


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), help="image height and width in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", nargs="+", help="only these, for example --steps inference")
    parser.add_argument("--compile", action="store_true", help="measure the compiled backbone, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    backbone = {"name": options.backbone, "frozen_stages": 2}
    model = build_detector(num_classes=80, backbone=backbone)
    images = torch.randn(1, 3, *options.size).contiguous(memory_format=torch.channels_last)
    once, once_bf16, contiguous = (copy.deepcopy(model) for _ in range(3))
    once.optimize()
    once_bf16.optimize(torch.bfloat16)
    contiguous.optimize()
    contiguous.backbone.to(memory_format=torch.contiguous_format)
    variants: dict[tuple[str, str], Callable[[], float]] = {
        ("training float32", "separate"): lambda: run(training_step, False, model, images, nullcontext),
        ("training float32", "folded"): lambda: run(training_step, True, model, images, nullcontext),
        ("training bf16", "separate"): lambda: run(training_step, False, model, images, bf16),
        ("training bf16", "folded"): lambda: run(training_step, True, model, images, bf16),
        ("inference float32", "separate"): lambda: run(inference, False, model, images, nullcontext),
        ("inference float32", "folded in each step"): lambda: run(inference, True, model, images, nullcontext),
        ("inference float32", "optimize()"): lambda: run(inference, True, once, images, nullcontext),
        ("inference float32", "optimize(), contiguous"): lambda: run(
            inference, True, contiguous, images.contiguous(), nullcontext
        ),
        ("inference bf16", "separate"): lambda: run(inference, False, model, images, bf16),
        ("inference bf16", "folded in each step"): lambda: run(inference, True, model, images, bf16),
        ("inference bf16", "optimize(bfloat16)"): lambda: run(inference, True, once_bf16, images, bf16),
    }
    if options.compile:
        compiled = copy.deepcopy(model)
        compiled.optimize(compile=True)
        name = ("inference float32", "optimize(compile=True)")
        variants[name] = lambda: run(inference, True, compiled, images, nullcontext)
    variants = {name: run for name, run in variants.items() if not options.steps or name[0].split()[0] in options.steps}
    times: dict[tuple[str, str], list[float]] = {name: [] for name in variants}
    for i in range(options.rounds + 1):
        for name, measure in variants.items():
            milliseconds = measure()
            if i:  # the first round warms up
                times[name].append(milliseconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    height, width = options.size
    table = Table(
        title=f"{options.backbone} and FPN, 1 x 3 x {height} x {width}, {options.threads} thread(s), median of "
        f"{options.rounds}, torch {torch.__version__}"
    )
    for column in ("step", "BatchNorm", "ms", "ratio", "speed-up over separate float32"):
        table.add_column(column, justify="left" if column in ("step", "BatchNorm") else "right")
    for (step, kind), value in medians.items():
        ratio = medians[step, "separate"] / value
        base = medians[f"{step.split()[0]} float32", "separate"] / value
        table.add_row(step, kind, f"{value:.0f}", f"{ratio:.2f}", f"{base:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
