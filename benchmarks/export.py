"""Exported files: their time per image, and the comparison with the model for all heads and backbones.

    pip install onnx onnxscript onnxruntime timm
    python benchmarks/export.py speed CHECKPOINT [--rounds 20] [--threads 1]
    python benchmarks/export.py speed r50 [--rounds 3] [--threads 1]
    python benchmarks/export.py parity

``speed`` prints the times of a detector in torch, compiled, and as exported files, in one run. All run the same drawn
image in turns, by itself and at the size of the test. The times are medians; a ratio is the median of the ratios to
torch within a round, which other programs on the machine disturb less than the times. ``r50`` is the full CPM R-CNN on
ResNet-50 with random weights, and its image has 800 x 1216 pixels.

``parity`` exports a small model with each head on each family of backbones to ONNX, and compares its detections with
those of the model in drawn images of three sizes and in a batch of the three.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torchvision.transforms.v2.functional import resize

from cpm_rcnn import load
from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import Detector
from cpm_rcnn.inference.export import export
from cpm_rcnn.inference.export.metadata import metadata
from cpm_rcnn.inference.export.onnx_file import OnnxRunner, write_onnx
from cpm_rcnn.inference.export.parity import drawn_images, run_batch
from cpm_rcnn.inference.export.program import trace
from cpm_rcnn.inference.export.pt2_file import REPLACEMENTS, Pt2Runner, write_pt2
from cpm_rcnn.models.build import build_detector

# Rounds that are not measured; the second size of images would compile a model again.
_WARM_UP = 2
# Height and width of the image for r50.
_LARGE = 800, 1216


def speed(model: str, rounds: int, threads: int) -> None:
    """Export, measure and print."""
    torch.set_num_threads(threads)
    detector = _detector(model).optimize()
    image = detector.resize(next(iter(drawn_images(detector).values())))
    if model == "r50":
        image = resize(image, list(_LARGE))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"detector.{name}" for name in ("pt2", "onnx")}
        write_pt2(trace(detector.model, REPLACEMENTS), files["pt2"], metadata(detector))
        write_onnx(trace(detector.model), files["onnx"], metadata(detector))
        pt2, onnx = Pt2Runner(files["pt2"]), OnnxRunner(files["onnx"], threads)
        sizes = {name: file.stat().st_size / 1e6 for name, file in files.items()}
    compiled = _detector(model).optimize(compile=True)
    ways: dict[str, Callable[[], object]] = {
        "torch": lambda: detector.model([image]),
        "torch, compiled": lambda: compiled.model([image]),
        ".pt2 file": lambda: run_batch(pt2, [image]),
        "onnxruntime": lambda: run_batch(onnx, [image]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(rounds + _WARM_UP):
            for name, detect in ways.items():
                begun = time.perf_counter()
                detect()
                times[name].append(1e3 * (time.perf_counter() - begun))
        found = len(detector.model([image])[0]["scores"])
    height, width = image.shape[-2:]
    table = Table(title=f"{height} x {width}, {found} detections, {threads} thread(s)")
    for column in ("", "ms", "ratio to torch"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values[_WARM_UP:], times["torch"][_WARM_UP:])]
        table.add_row(name, f"{statistics.median(values[_WARM_UP:]):.1f}", f"{statistics.median(ratios):.2f}")
    _print(table)
    print(", ".join(f"{name}: {size:.1f} MB" for name, size in sizes.items()))


def _detector(model: str) -> Detector:
    if model != "r50":
        return load(Path(model))
    torch.manual_seed(0)
    net = build_detector(num_classes=80, backbone={"name": "resnet50"}).eval()
    # The scores of random weights are almost equal, and so are the cells of their heatmaps.
    with torch.no_grad():
        for name, layer in net.named_modules():
            if name.endswith(("predictor", "cls_logits", "deconvs.3")):
                torch.nn.init.normal_(layer.weight, std=0.5)
    return Detector(net, [{"id": i, "name": str(i)} for i in range(1, 81)])


def parity() -> None:
    """Export all combinations and print how far their detections are from those of the models."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    small = import_module("exported_models")
    torch.set_num_threads(1)
    table = Table(title="detections; largest differences of a coordinate in pixels and of a score")
    for column in ("head", *small.BACKBONES):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        for head, options in small.HEADS.items():
            cells = []
            for backbone in small.BACKBONES.values():
                detector = small.make_detector(sizes={"short_side": None}, backbone=backbone, **options)
                try:
                    found = export(detector, Path(folder) / "detector.onnx", images=small.three_sizes())
                    cells.append(f"{found.detections}; {found.box:.1g}; {found.score:.1g}")
                except UserError as error:
                    cells.append(str(error))
            table.add_row(head, *cells)
    _print(table)


def _print(table: Table) -> None:
    console = Console(width=160)
    console.print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    console.print(table)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    measured = modes.add_parser("speed")
    measured.add_argument("model", help="a checkpoint, or r50")
    measured.add_argument("--rounds", type=int, default=20)
    measured.add_argument("--threads", type=int, default=1)
    modes.add_parser("parity")
    arguments = parser.parse_args()
    if arguments.mode == "parity":
        parity()
    else:
        speed(arguments.model, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
