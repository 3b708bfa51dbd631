"""Training step and inference of this project's heads and of torchvision's Faster R-CNN, in one run.

    python benchmarks/steps.py [--models cpm fused faster] [--objects 64] [--size 800 1216] [--batch 1]

R-50 with a feature pyramid, frozen BatchNorm, stem and C2 frozen, random weights, 80 classes. A training step is
forward and backward with ``--objects`` objects per image. At test, the score threshold is set so that ``--candidates``
pairs of RoI and class enter the NMS of each model, and at most 100 boxes per image are kept. All models and precisions
take turns, so that other programs slow all of them down; times are medians over the rounds, and ratios are medians of
the ratios within a round. ``bf16`` is autocast.

This project's models run in one process and torchvision's in another one, because the commands of this project set how
memory is freed (``cpm_rcnn.cli.memory``), and torchvision leaves it as it is; ``--keep-memory`` sets it in both.

Models: ``fused`` is one grid stage with feature fusion (Grid R-CNN), ``cpm`` is the paper's model.

    python benchmarks/steps.py --vary objects 1 64 300 1000      (also: batch 1 2 4, side 400 600 800)
    python benchmarks/steps.py --parts                           (backbone and pyramid, RPN, head)
"""

import argparse
import copy
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.resnet import resnet50
from torchvision.ops import FrozenBatchNorm2d

from cpm_rcnn.cli.memory import keep_freed_memory
from cpm_rcnn.models.build import build_detector

ONE_STAGE = [{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0}]
MODELS: dict[str, dict[str, Any]] = {
    "fused": {"stages": ONE_STAGE, "fusion": True, "ism": False, "rsm": False},
    "one_stage": {"stages": ONE_STAGE, "ism": False, "rsm": False},
    "cpm": {},
    "faster": {"head": "faster"},
    "cascade": {"head": "cascade"},
}
PEER = "torchvision"
CLASSES, KEPT = 80, 100


def build(name: str, size: tuple[int, int]) -> nn.Module:
    """A model with random weights."""
    torch.manual_seed(0)
    if name == PEER:
        body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        backbone = _resnet_fpn_extractor(body, trainable_layers=3)
        anchors = AnchorGenerator(tuple((side,) for side in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
        return FasterRCNN(
            backbone, CLASSES + 1, min_size=min(size), max_size=max(size), rpn_anchor_generator=anchors,
            box_detections_per_img=KEPT,
        )  # fmt: skip
    options = {"max_detections": KEPT, **MODELS[name]}
    return build_detector({"name": "resnet50", "frozen_stages": 2}, num_classes=CLASSES, **options)


def class_logits(model: nn.Module) -> nn.Module:
    """The layer of the first class logits."""
    if isinstance(model, FasterRCNN):
        return model.roi_heads.box_predictor.cls_score
    head: Any = model.head
    return head.classifier.predictor if hasattr(head, "classifier") else head.stages[0].classifier.predictor


def set_threshold(model: nn.Module, infer: Callable[[], Any], candidates: int) -> None:
    """Set the score threshold so that that many pairs of RoI and class exceed it."""
    seen: list[Tensor] = []
    handle = class_logits(model).register_forward_hook(lambda module, given, out: seen.append(out.float().softmax(1)))
    infer()
    handle.remove()
    threshold = seen[0][:, 1:].flatten().topk(candidates + 1).values[-1].item()
    if isinstance(model, FasterRCNN):
        model.roi_heads.score_thresh = threshold
    else:
        head: Any = model.head
        object.__setattr__(head.settings, "score_threshold", threshold)


def prepare(name: str, options: argparse.Namespace) -> tuple[Callable[[], Any], Callable[..., Any], nn.Module]:
    """The training step of a model, its inference, which takes a dtype for ``--optimize``, and the model."""
    height, width = options.size
    model = build(name, (height, width)).to(options.device)
    generator = torch.Generator().manual_seed(0)
    images = list(torch.randint(0, 256, (options.batch, 3, height, width), generator=generator, dtype=torch.uint8))
    targets = []
    for _ in images:
        sides = 8 + 160 * torch.rand(options.objects, 2, generator=generator)
        corners = torch.rand(options.objects, 2, generator=generator) * (torch.tensor([width, height]) - sides)
        labels = torch.randint(1, CLASSES + 1, (options.objects,), generator=generator)
        targets.append({"boxes": torch.cat([corners, corners + sides], 1), "labels": labels})
    images = [image.to(options.device) for image in images]
    targets = [{key: value.to(options.device) for key, value in target.items()} for target in targets]
    given = [image.float() / 255 for image in images] if name == PEER else images

    def step() -> None:
        model.train()
        torch.stack(list(model(given, targets).values())).sum().backward()
        model.zero_grad()

    testers: dict[torch.dtype | None, nn.Module] = {}

    def infer(dtype: torch.dtype | None = None) -> Any:
        tester = testers.get(dtype, model).eval()
        with torch.inference_mode():
            return tester(given)

    set_threshold(model, infer, options.candidates)
    if name != PEER and options.optimize:
        for dtype in (None, torch.bfloat16):
            testers[dtype] = copy.deepcopy(model)
            testers[dtype].optimize(dtype or torch.float32, compile=options.compile)  # type: ignore[operator]
    if name != PEER and options.compile:
        model.compile_layers("reduce-overhead")  # type: ignore[operator]
    return step, infer, model


def timed(work: Callable[[], Any], dtype: torch.dtype | None, device: str) -> float:
    """Seconds of one call; ``dtype`` is that of autocast."""
    synchronize(device)
    start = time.perf_counter()
    with torch.autocast(device, dtype) if dtype is not None else nullcontext():
        work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until a GPU has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


_prepared: dict[str, tuple[Callable[[], Any], Callable[..., Any], nn.Module]] = {}


def start(names: Sequence[str], options: argparse.Namespace, keep_memory: bool) -> None:
    """Build the models of a process."""
    if keep_memory:
        keep_freed_memory()
    _prepared.update({name: prepare(name, options) for name in names})


def measured(name: str, work: str, dtype: torch.dtype | None, device: str) -> float:
    """Seconds of one training step or inference of a model of this process."""
    step, infer, _ = _prepared[name]
    return timed(step if work == "training" else partial(infer, dtype), dtype, device)


def compare(options: argparse.Namespace) -> dict[tuple[str, str, str], list[float]]:
    """Seconds per round, by model, work and precision; the first round is not counted."""
    precisions = {"float32": None, "bf16": torch.bfloat16} if options.bf16 else {"float32": None}
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, start, (options.models, options, True)) as ours,
        ProcessPoolExecutor(1, context, start, ([PEER], options, options.keep_memory)) as peer,
    ):
        for number in range(options.rounds + 1):
            for name in (PEER, *options.models):
                for precision, dtype in precisions.items():
                    for work in ("training", "inference"):
                        process = peer if name == PEER else ours
                        seconds = process.submit(measured, name, work, dtype, options.device).result()
                        if number:
                            times[name, work, precision].append(seconds)
    return times


def parts(options: argparse.Namespace) -> None:
    """Print the forward time of the parts of each model, at test."""
    table = Table(title="forward at test, ms", title_justify="left")
    for column in ("model", "backbone and pyramid", "RPN", "head", "all"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in [PEER, *options.models]:
        _, infer, model = prepare(name, options)
        measured: dict[str, list[float]] = defaultdict(list)
        for label, module in zip(("trunk", "rpn"), _parts(model)):
            starts: list[float] = []
            module.register_forward_pre_hook(partial(_begin, starts))
            module.register_forward_hook(partial(_end, starts, measured[label]))
        for _ in range(options.rounds + 1):
            measured["all"].append(timed(infer, None, options.device))
        milliseconds = {label: 1e3 * statistics.median(values[1:]) for label, values in measured.items()}
        rest = milliseconds["all"] - milliseconds["trunk"] - milliseconds["rpn"]
        cells = (milliseconds["trunk"], milliseconds["rpn"], rest, milliseconds["all"])
        table.add_row(name, *(f"{cell:.0f}" for cell in cells))
    Console(width=120).print(table)
    print("head: everything that is neither backbone, pyramid nor RPN")


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model.backbone, model.rpn  # type: ignore[return-value]


def _begin(starts: list[float], *_: Any) -> None:
    starts.append(time.perf_counter())


def _end(starts: list[float], seconds: list[float], *_: Any) -> None:
    seconds.append(time.perf_counter() - starts.pop())


def show(times: dict[tuple[str, str, str], list[float]], title: str) -> None:
    """Print seconds, and the ratio to torchvision in float32 of the same work."""
    table = Table(title=title, title_justify="left")
    for column in ("model", "work", "precision", "seconds", f"of {PEER}'s in float32"):
        table.add_column(column, justify="left" if column in ("model", "work", "precision") else "right")
    for (name, work, precision), seconds in sorted(
        times.items(), key=lambda item: (item[0][1], item[0][2] != "float32")
    ):
        ratios = [own / peer for own, peer in zip(seconds, times[PEER, work, "float32"])]
        table.add_row(name, work, precision, f"{statistics.median(seconds):.2f}", f"{statistics.median(ratios):.2f}")
    Console(width=120).print(table)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["fused", "cpm"])
    parser.add_argument("--objects", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1216], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--optimize", action="store_true", help="Detector.optimize for our inference")
    parser.add_argument("--compile", action="store_true", help="torch.compile for our layers")
    parser.add_argument("--keep-memory", action="store_true", help="torchvision's process keeps freed memory, too")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--vary", nargs="+", metavar=("NAME", "VALUE"), help="objects, batch or side, and its values")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    if options.parts:
        parts(options)
        return
    name, values = (options.vary[0], options.vary[1:]) if options.vary else ("objects", [str(options.objects)])
    for value in map(int, values):
        if name == "side":
            options.size = [value, value * 3 // 2 // 32 * 32]
        else:
            setattr(options, name, value)
        height, width = options.size
        threads = torch.get_num_threads()
        title = f"R-50, {options.batch} x {height} x {width}, {options.objects} objects, {threads} threads"
        show(compare(options), title if options.device == "cpu" else f"{title}, {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
