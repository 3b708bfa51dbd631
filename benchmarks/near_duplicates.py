"""How far apart the fingerprints of copies of an image are, and those of different images.

    python benchmarks/near_duplicates.py FOLDER

Takes up to 200 JPEGs of a folder. Prints, in bits, the median and the maximum distance between an image and each kind
of copy, the share of copies within the limit, the smallest distances between different images, and the time per image.
"""

import argparse
import io
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageEnhance

from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.near_duplicates import FINGERPRINT_BITS, SIMILAR_BITS, fingerprints


def copies(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Copies of an image, each with what was done to it. The last two are too different to be found."""
    width, height = image.size

    def cut(part: float) -> Image.Image:
        return image.crop((round(part * width), round(part * height), width, height))

    yield "half the size", image.resize((width // 2, height // 2))
    yield "JPEG quality 40", _recompressed(image, 40)
    yield "30% brighter", ImageEnhance.Brightness(image).enhance(1.3)
    yield "2% cropped at each side", image.crop((width // 50, height // 50, width - width // 50, height - height // 50))
    yield "a part of 1/8 covered", _covered(image)
    yield "1% of two sides cut off", cut(0.01)
    yield "4% of two sides cut off", cut(0.04)
    yield "flipped", image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _recompressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def _covered(image: Image.Image) -> Image.Image:
    """A copy in which one eighth of each side in the middle shows another part."""
    width, height = image.size
    covered = image.copy()
    covered.paste(image.crop((0, 0, width // 8, height // 8)), (width // 2, height // 2))
    return covered


def bits_of(folder: Path, images: list[Image.Image]) -> np.ndarray:
    """The fingerprints (N, bits) of images that are saved without loss."""
    names = [f"{number:04d}.bmp" for number in range(len(images))]
    for name, image in zip(names, images):
        image.save(folder / name)
    return fingerprints(ImageSource(folder), names)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    names = sorted(path.name for path in folder.glob("*.jpg"))[:200]
    start = time.perf_counter()
    bits, _ = fingerprints(ImageSource(folder), names)
    seconds = time.perf_counter() - start
    images = [Image.open(folder / name).convert("RGB") for name in names]
    print(f"{len(names)} images, {FINGERPRINT_BITS} bits, similar up to {SIMILAR_BITS} bits")
    by_kind: dict[str, list[Image.Image]] = {}
    for image in images:
        for kind, copy in copies(image):
            by_kind.setdefault(kind, []).append(copy)
    for kind, changed in by_kind.items():
        with TemporaryDirectory() as temporary:
            distances = (bits_of(Path(temporary), changed) != bits).sum(axis=1)
        similar = (distances <= SIMILAR_BITS).mean()
        print(f"{kind}: median {np.median(distances):.0f}, maximum {distances.max()}, similar {similar:.1%}")
    between = np.sort((bits[:, None] != bits).sum(axis=2)[np.triu_indices(len(bits), 1)])
    low = between[len(between) // 1000]
    print(f"different images: minimum {between[0]}, 0.1% below {low}, of {len(between)} pairs")
    print(f"{1e3 * seconds / len(names):.1f} ms per image")


if __name__ == "__main__":
    main()
