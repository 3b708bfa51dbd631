"""JPEG decoders: time, and difference from Pillow's pixels.

    python benchmarks/decoders.py [--rounds 15]

Decodes the images of ``benchmarks/loader.py`` to (3, H, W) uint8, in one thread, with each decoder that is installed
(``pip install opencv-python-headless torchcodec``). All decoders take turns; times are medians over the rounds of the
CPU time, and ratios are medians of the ratios within a round.

The second table is of large images that are then resized to 1067 x 800 pixels. JPEG decoders can return an image at
half its size for less work (``draft`` in Pillow), after which the resized image differs.
"""

import argparse
import io
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2 import functional

from loader import draw

Decoder = Callable[[bytes], Tensor]

PILLOW = "Pillow"
SIZE = (1067, 800)


def pillow(raw: bytes, draft: tuple[int, int] | None = None) -> Tensor:
    """Pillow; with ``draft``, at the smallest of 1/1, 1/2, 1/4 and 1/8 of the size that is not below it."""
    image = Image.open(io.BytesIO(raw))
    image.draft(None, draft)
    return functional.pil_to_tensor(image.convert("RGB"))


def from_array(pixels: np.ndarray) -> Tensor:
    """(3, H, W) from (H, W, 3), without a copy."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def with_simplejpeg() -> Decoder:
    """Decode with simplejpeg."""
    decode = import_module("simplejpeg").decode_jpeg
    return lambda raw: from_array(decode(raw))


def with_opencv() -> Decoder:
    """Decode with OpenCV."""
    cv2 = import_module("cv2")
    cv2.setNumThreads(1)
    return lambda raw: from_array(cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR_RGB))


def with_torchcodec() -> Decoder:
    """Decode with torchcodec, which replaces torchvision.io."""
    decode: Any = import_module("torchcodec.decoders").decode_jpeg
    return partial(decode, mode="RGB")


def with_torchvision() -> Decoder:
    """Decode with torchvision.io."""
    decode = import_module("torchvision.io").decode_jpeg
    return lambda raw: decode(torch.frombuffer(raw, dtype=torch.uint8), mode="RGB")


OTHERS = {
    "simplejpeg": with_simplejpeg,
    "torchcodec": with_torchcodec,
    "torchvision.io": with_torchvision,
    "OpenCV": with_opencv,
}


def installed() -> dict[str, Decoder]:
    """The decoders that can be used here."""
    decoders: dict[str, Decoder] = {PILLOW: pillow}
    for name, make in OTHERS.items():
        try:
            decoders[name] = make()
        except Exception as error:
            print(f"{name}: {str(error).splitlines()[0]}")
    return decoders


def resized(image: Tensor) -> Tensor:
    """The image in the size of the second table."""
    return functional.resize(image, list(SIZE[::-1]), antialias=True)


def compare(functions: dict[str, Decoder], files: Sequence[bytes], rounds: int, title: str) -> None:
    """Print the time of each function, and how its results differ from those of the first."""
    reference, *_ = functions.values()
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            for raw in files:
                function(raw)
            if number:
                seconds[name].append((time.process_time() - start) / len(files))
    table = Table(title=title, title_justify="left")
    for column in ("", "ms", "of Pillow's", "largest difference", "pixel values that differ by more than 1"):
        table.add_column(column, justify="right" if column else "left")
    base, *_ = seconds.values()
    for name, values in seconds.items():
        differences = [(functions[name](raw).int() - reference(raw).int()).abs() for raw in files]
        ratio = statistics.median(own / other for own, other in zip(values, base))
        share = sum(float((difference > 1).float().mean()) for difference in differences) / len(files)
        largest = max(int(difference.max()) for difference in differences)
        table.add_row(name, f"{1e3 * statistics.median(values):.2f}", f"{ratio:.2f}", str(largest), f"{share:.1%}")
    Console(width=120).print(table)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchvision.io is deprecated, and torch.frombuffer wants writable memory
    decoders = installed()
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name, "small"), Path(name, "large")
        draw(folders[0], [(640, 480), (640, 427), (480, 640), (427, 640)] * 6)
        draw(folders[1], [(4000, 3000)] * 2)
        small, large = ([file.read_bytes() for file in sorted(folder.iterdir())] for folder in folders)
    compare(decoders, small, rounds, "640 x 480 and similar, 4:2:0, decoded")
    ways: dict[str, Decoder] = {label: lambda raw, f=f: resized(f(raw)) for label, f in decoders.items()}  # type: ignore
    ways["Pillow, draft"] = lambda raw: resized(pillow(raw, SIZE))
    if "simplejpeg" in decoders:
        decode = import_module("simplejpeg").decode_jpeg
        half = partial(decode, min_width=SIZE[0], min_height=SIZE[1], min_factor=2)
        ways["simplejpeg, half size"] = lambda raw: resized(from_array(half(raw)))
    compare(ways, large, rounds, "4000 x 3000, decoded and resized to 1067 x 800")


if __name__ == "__main__":
    main()
