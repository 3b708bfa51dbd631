"""Images per CPU second of the data loader, beside torchvision's reference pipeline; memory of its workers.

    python benchmarks/loader.py [--large] [--images FOLDER] [--rounds 9] [--keep-memory]
    python benchmarks/loader.py --memory [--epochs 2]

The images are JPEGs of noise with the spectrum of photographs, drawn into a temporary folder: 640 x 480 pixels and
similar, about 170 kB, or with ``--large`` 4000 x 3000 pixels. ``--images`` takes those of a folder instead. All are
resized to a shorter side of 800 and a longer side of at most 1333 pixels, and half of them are flipped.

torchvision's pipeline is that of its references/detection: ``CocoDetection`` (Pillow), ``RandomHorizontalFlip``,
``ToImage``, ``ToDtype``. Its data loader returns float32 images in their own size, and ``GeneralizedRCNNTransform``,
the first part of its models, normalizes, resizes and pads them. Here, the data loader returns resized uint8 images, and
``ImagePreprocessor`` normalizes and pads them on the device. So two comparisons are made: up to the batch that enters
the backbone, all of it on the CPU, and the data loaders alone. ``uint8`` is a pipeline of torchvision's transforms
that resizes before the conversion to float32, which torchvision's references do not do.

In the first table everything runs in one thread of one process. In the second, the data loaders have one worker
process and batches of two images, and the main process does the rest; the CPU time of both processes is added. All
pipelines take turns; times are medians over the rounds, and ratios are medians of the ratios within a round.
Ours run in one process and torchvision's in another, because glibc keeps freed memory in ours, as it does in the
program's commands, and not in torchvision's, whose references leave it as it is. With ``--keep-memory`` it keeps it in
both.

With ``--memory``, a json of 118,287 images and 860,001 objects is written, whose images are 24 small files. Eight
workers read it for some epochs. PSS is the memory of a process in which a page that n processes share counts as 1/n, so
its sum is what the processes take together. Mapped files, most of them libraries, count less while other programs use
them; the last column leaves them out. Batches that wait in the workers are files in memory, which belong to no process:
at most 4 per worker.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from annotations import IMAGES, OBJECTS, content
from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.cli.memory import keep_freed_memory
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.models.backbones.input_format import RGB
from cpm_rcnn.models.preprocess import ImagePreprocessor

SHORT_SIDE, MAX_SIZE, OBJECTS_PER_IMAGE, BATCH = 800, 1333, 7, 2
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OURS, OURS_INPUT = "ours: data loader", "ours: with ImagePreprocessor"
PEER, PEER_INPUT = "torchvision: data loader", "torchvision: with GeneralizedRCNNTransform"
PEER_UINT8 = "torchvision: uint8, resized and normalized"
PEERS = {PEER: OURS, PEER_INPUT: OURS_INPUT, PEER_UINT8: OURS_INPUT}
# Ends the names of the pipelines with a worker process.
WORKER = ", one worker"
# Passes over the images per round: the CPU time of a worker is read in units of 10 ms.
REPEATS = 8

# Reads all images; returns CPU seconds per image.
Pass = Callable[[], float]


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose amplitudes fall with the frequency, as those of photographs do."""
    if max(width, height) > 2000:  # large photographs are less sharp
        return photograph(rng, width // 2, height // 2).resize((width, height), Image.Resampling.BICUBIC)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    waves = rng.standard_normal((3, *frequency.shape)) + 1j * rng.standard_normal((3, *frequency.shape))
    gray, red, blue = (plane / plane.std() for plane in np.fft.irfft2(waves / frequency, (height, width)))
    pixels = 128 + 45 * np.stack([gray + 0.3 * red, gray, gray + 0.3 * blue], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
    """Write a JPEG for each (width, height) into a new folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        photograph(rng, width, height).save(folder / f"{number:012d}.jpg", quality=90)


def write_json(path: Path, folder: Path) -> None:
    """Annotations with random objects for the images of a folder."""
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file in sorted(folder.iterdir()):
        with Image.open(file) as image:
            width, height = image.size
        images.append({"id": len(images), "file_name": file.name, "width": width, "height": height})
        for _ in range(OBJECTS_PER_IMAGE):
            corner, side = rng.random(2) * (width, height) * 0.6, rng.random(2) * (width, height) * 0.3 + 4
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": images[-1]["id"],
                    "category_id": int(rng.integers(1, 81)),
                    "bbox": [*corner.tolist(), *side.tolist()],
                    "area": float(side.prod()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": key, "name": f"class {key}"} for key in range(1, 81)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def our_module(folder: Path, file: Path, **options: Any) -> CocoDataModule:
    """The data module of a folder of images and its json, which is beside the folder."""
    return CocoDataModule(root=str(folder.parent), train_json=file.name, train_images=folder.name, **options)


def peer_dataset(folder: Path, file: Path, *resizing: v2.Transform) -> Dataset:
    """The same files as torchvision's data set; ``resizing`` comes before the conversion to float32."""
    normalizing = [v2.Normalize(MEAN, STD)] if resizing else []
    transforms = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.ToImage(),
            *resizing,
            v2.ToDtype(torch.float32, scale=True),
            *normalizing,
            v2.ConvertBoundingBoxFormat(tv_tensors.BoundingBoxFormat.XYXY),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    dataset = CocoDetection(folder, file, transforms=transforms)
    return wrap_dataset_for_transforms_v2(dataset, target_keys={"boxes", "labels", "image_id"})


def pairs(batch: list[Any]) -> tuple[Any, ...]:
    """The ``collate_fn`` of torchvision's references."""
    return tuple(zip(*batch))


def peer_loader(dataset: Dataset, **options: Any) -> DataLoader:
    """The data loader of torchvision's references, with workers that live on after an epoch."""
    return DataLoader(dataset, collate_fn=pairs, persistent_workers=True, **options)


def our_pipelines(folder: Path, file: Path) -> dict[str, Pass]:
    """This program's pipelines, each a function that reads all images and returns the CPU seconds per image."""
    steps = len(list(folder.iterdir())) * REPEATS // BATCH
    dataset: Any = our_module(folder, file, max_steps=1).train_dataloader().dataset
    loader = our_module(folder, file, max_steps=steps, batch_size=BATCH, num_workers=1).train_dataloader()
    preprocess = ImagePreprocessor(RGB, CONTINUOUS)
    return {
        OURS: partial(one_thread, dataset, lambda sample: None),
        OURS_INPUT: partial(one_thread, dataset, lambda sample: preprocess([sample[0]])),
        OURS + WORKER: partial(one_worker, loader, 1, lambda batch: None),
        OURS_INPUT + WORKER: partial(one_worker, loader, 1, lambda batch: preprocess(batch[0])),
    }


def peer_pipelines(folder: Path, file: Path) -> dict[str, Pass]:
    """Those of torchvision, as :func:`our_pipelines`."""
    dataset = peer_dataset(folder, file)
    resized = peer_dataset(folder, file, v2.Resize(SHORT_SIDE, max_size=MAX_SIZE, antialias=True))
    transform = GeneralizedRCNNTransform(SHORT_SIDE, MAX_SIZE, MEAN, STD)
    options: dict[str, Any] = {"num_workers": 1, "batch_size": BATCH, "shuffle": True}
    loader, resized_loader = (peer_loader(each, **options) for each in (dataset, resized))
    return {
        PEER: partial(one_thread, dataset, lambda sample: None),
        PEER_INPUT: partial(one_thread, dataset, lambda sample: transform([sample[0]], [sample[1]])),
        PEER_UINT8: partial(one_thread, resized, lambda sample: transform.batch_images([sample[0]])),
        PEER + WORKER: partial(one_worker, loader, REPEATS, lambda batch: None),
        PEER_INPUT + WORKER: partial(one_worker, loader, REPEATS, lambda batch: transform(*batch)),
        PEER_UINT8 + WORKER: partial(
            one_worker, resized_loader, REPEATS, lambda batch: transform.batch_images(list(batch[0]))
        ),
    }


def one_thread(dataset: Any, use: Callable[[Any], Any]) -> float:
    """CPU seconds per image of reading and using all images in this process."""
    start = time.process_time()
    for number in range(len(dataset)):
        use(dataset[number])
    return (time.process_time() - start) / len(dataset)


def one_worker(loader: DataLoader, passes: int, use: Callable[[Any], Any]) -> float:
    """CPU seconds per image of some passes over a loader, of its worker and this process together."""
    if loader._iterator is None:  # the worker has not been started
        iter(loader)
    workers = worker_ids(loader)
    start = time.process_time() + sum(map(cpu_seconds, workers))
    images = 0
    for _ in range(passes):
        for batch in loader:
            use(batch)
            images += len(batch[0])
    return (time.process_time() + sum(map(cpu_seconds, workers)) - start) / images


def cpu_seconds(process: int) -> float:
    """User and system time of a process, in units of 10 ms."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


_pipelines: dict[str, Pass] = {}


def prepare(build: Callable[[Path, Path], dict[str, Pass]], keep_memory: bool, folder: Path, file: Path) -> None:
    """Build the pipelines of a process."""
    if keep_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    _pipelines.update(build(folder, file))


def measured(name: str) -> float:
    """CPU seconds per image of one pass of a pipeline of this process."""
    return _pipelines[name]()


def measure(folder: Path, file: Path, rounds: int, keep_memory: bool) -> dict[str, list[float]]:
    """CPU seconds per image of each round, by pipeline; the first round is not counted."""
    seconds: dict[str, list[float]] = defaultdict(list)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, prepare, (our_pipelines, True, folder, file)) as ours,
        ProcessPoolExecutor(1, context, prepare, (peer_pipelines, keep_memory, folder, file)) as peers,
    ):
        for number in range(rounds + 1):
            for work in ("", WORKER):
                for name in (OURS, OURS_INPUT, PEER, PEER_INPUT, PEER_UINT8):
                    process = ours if name in (OURS, OURS_INPUT) else peers
                    value = process.submit(measured, name + work).result()
                    if number:
                        seconds[name + work].append(value)
    return seconds


def worker_ids(loader: DataLoader) -> list[int]:
    """The process ids of the persistent workers of a data loader that has been used."""
    iterator: Any = loader._iterator
    return [worker.pid for worker in iterator._workers]


def show(seconds: dict[str, list[float]], title: str, work: str = "") -> None:
    """Print milliseconds, images per second, and how many times as many images ours reads as each peer."""
    table = Table(title=title, title_justify="left")
    for column in ("pipeline", "CPU ms per image", "images/s per core", "ours is faster by"):
        table.add_column(column, justify="left" if column == "pipeline" else "right")
    for name in (OURS, OURS_INPUT, *PEERS):
        values = seconds[name + work]
        mean = statistics.median(values)
        own = seconds[PEERS[name] + work] if name in PEERS else None
        ratio = statistics.median(peer / ours for peer, ours in zip(values, own)) if own else None
        table.add_row(name, f"{1e3 * mean:.2f}", f"{1 / mean:.0f}", f"{ratio:.2f}" if ratio else "")
    Console(width=120).print(table)


def speed(folder: Path, file: Path, rounds: int, keep_memory: bool) -> None:
    """Print the two tables."""
    files = list(folder.iterdir())
    kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1e3
    what = f"{len(files)} images of {kilobytes:.0f} kB"
    seconds = measure(folder, file, rounds, keep_memory)
    show(seconds, f"{what}, one thread")
    show(seconds, f"{what}, one worker and the main process", WORKER)


def pss(processes: Iterable[int]) -> tuple[float, float]:
    """Proportional set size of some processes in MB, and the part of it that is not of mapped files."""
    total = private = 0.0
    for process in processes:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines}
        total += kilobytes["Pss:"] / 1e3
        private += (kilobytes["Pss_Anon:"] + kilobytes["Pss_Shmem:"]) / 1e3
    return total, private


def watch(name: str, loader: DataLoader, images: int, epochs: int) -> None:
    """Print the memory of the main process and the workers at the start and after each quarter of an epoch."""
    table = Table(title=name, title_justify="left")
    for column in ("epochs read", "main process, MB", "8 workers, MB", "together, MB", "without files, MB"):
        table.add_column(column, justify="right")
    seen = quarters = 0
    for batch in loader:
        seen += len(batch[0])
        if 4 * seen >= quarters * images:
            (main, main_private), (workers, workers_private) = pss([os.getpid()]), pss(worker_ids(loader))
            values = main, workers, main + workers, main_private + workers_private
            table.add_row(f"{seen / images:.2f}", *(f"{value:.0f}" for value in values))
            quarters += 1
    Console(width=120).print(table)


def write_large_json(path: Path) -> list[int]:
    """Annotations of the size of COCO's for 24 images of 160 x 160 pixels; returns the rows of those with objects."""
    data = content(IMAGES, OBJECTS)
    for number, image in enumerate(data["images"]):
        image.update(file_name=f"{number % 24:012d}.jpg", width=160, height=160)
    for item in data["annotations"]:
        item["bbox"] = [value / 4 for value in item["bbox"]]
    path.write_text(json.dumps(data))
    with_objects = {item["image_id"] for item in data["annotations"]}
    return [row for row, image in enumerate(data["images"]) if image["id"] in with_objects]


def memory(root: Path, epochs: int) -> None:
    """Print the memory of eight workers that read a json of the size of COCO's."""
    folder, file, options = root / "images", root / "train.json", {"batch_size": 16, "num_workers": 8}
    draw(folder, [(160, 160)] * 24)
    rows = write_large_json(file)

    def ours() -> DataLoader:
        steps = -(-len(rows) * epochs // options["batch_size"])
        module = our_module(folder, file, max_steps=steps, short_sides=(160,), max_size=160, **options)
        return module.train_dataloader()

    def peer() -> DataLoader:
        # One data loader for all epochs, so that its workers live as long as ours.
        order = torch.cat([torch.tensor(rows)[torch.randperm(len(rows))] for _ in range(epochs)]).tolist()
        return peer_loader(peer_dataset(folder, file), sampler=order, **options)

    watch("ours", ours(), len(rows), epochs)
    watch("torchvision's CocoDetection", peer(), len(rows), epochs)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="use the JPEGs of a folder")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--keep-memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if options.memory:
            memory(root, options.epochs)
            return
        if options.images:
            (root / "images").symlink_to(options.images.absolute())
        else:
            sizes = [(4000, 3000)] * 4 if options.large else [(640, 480), (640, 427), (480, 640), (427, 640)] * 6
            draw(root / "images", sizes)
        write_json(root / "train.json", root / "images")
        speed(root / "images", root / "train.json", options.rounds, options.keep_memory)


if __name__ == "__main__":
    main()
