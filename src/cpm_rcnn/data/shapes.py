"""The built-in data set: synthetic shapes on textured backgrounds, written to disk in COCO's format.

A small detector can be trained on it within minutes. Shapes of five classes, each with its own range of colors, have
COCO's small, medium and large areas and are rotated, overlapping and cut off at the image border. Some images contain a
crowd (a cluster of tiny shapes under one ``iscrowd`` box), some contain nothing. Boxes and areas are those of the
visible pixels.
"""

import colorsys
import json
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cpm_rcnn.errors import ArgumentError

CLASSES = ("circle", "square", "triangle", "star", "cross")
CATEGORIES: list[dict[str, Any]] = [{"id": number + 1, "name": name} for number, name in enumerate(CLASSES)]

# Stored in the marker file. Increase it whenever the same arguments render different images.
_VERSION = 1
_MARKER = "shapes.json"
# Shapes are drawn at this multiple of the image's resolution and averaged, which smooths their edges.
_SUPERSAMPLING = 4


def write_shapes(root: str | Path, train_images: int, val_images: int, seed: int = 0) -> None:
    """Render the data set into ``root``, unless it already exists.

    The folder appears complete or not at all: it is written under a temporary name next to ``root`` and then renamed,
    so several processes may call this at the same time. The same arguments give the same files.

    Args:
        root: folder to create, with ``annotations/instances_{train,val}.json``, ``train/`` and ``val/``.
        train_images: number of training images.
        val_images: number of validation images.
        seed: random seed of the drawings.

    Raises:
        ArgumentError: ``root`` contains something else, or cannot be written.
    """
    root = Path(root).absolute()
    marker = {"version": _VERSION, "train_images": train_images, "val_images": val_images, "seed": seed}
    if _is_complete(root, marker):
        return
    temporary = root.with_name(f".{root.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        _write_split(temporary, "train", train_images, [seed, 0])
        _write_split(temporary, "val", val_images, [seed, 1])
        (temporary / _MARKER).write_text(json.dumps(marker))
        try:
            os.rename(temporary, root)
        except OSError:
            # Another process was faster; its files are the same.
            if not _is_complete(root, marker):
                raise
    except OSError as error:
        raise ArgumentError("root", f"={root}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def render(
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray]:
    """Draw one image.

    Args:
        rng: the only source of randomness.

    Returns:
        The image (H, W, 3) uint8 RGB; its objects in COCO's format (``category_id``, ``bbox`` xywh in pixels, ``area``,
        ``iscrowd``); and an (H, W) int64 map of the object that each pixel shows, -1 for the background.
    """
    sides = int(rng.integers(240, 273)), int(rng.integers(176, 209))
    width, height = sides if rng.random() < 0.7 else sides[::-1]
    canvas = _Canvas(_background(rng, height, width))
    if rng.random() < 0.95:
        if rng.random() < 0.08:
            canvas.add(rng, int(rng.integers(5)), _crowd_sizes(rng), is_crowd=True)
        if rng.random() < 0.6:
            canvas.add(rng, int(rng.integers(5)), [rng.uniform(100, 125)])
        for _ in range(rng.integers(1, 7)):
            # Log-uniform: as many shapes from 12 to 24 pixels as from 24 to 48.
            canvas.add(rng, int(rng.integers(5)), [math.exp(rng.uniform(math.log(12), math.log(110)))])
    return canvas.finish()


class _Canvas:
    """An image that is being drawn, with the object that each pixel shows."""

    def __init__(self, background: np.ndarray) -> None:
        self.image = background
        self.owner: np.ndarray = np.full(background.shape[:2], -1, dtype=np.int64)
        self.objects: list[tuple[int, bool, int]] = []  # class, is a crowd, pixels before later objects hide some

    def add(self, rng: np.random.Generator, kind: int, sizes: list[float], is_crowd: bool = False) -> None:
        """Draw one object made of shapes with the areas ``sizes`` squared; give up if there is no room."""
        for _ in range(10):
            coverage, edge, full = self._place(rng, kind, sizes)
            mask = coverage >= 0.5
            # Most of it must be inside the image, and the objects that it covers must stay recognizable.
            if mask.sum() >= 0.6 * full and self._leaves_others_visible(mask):
                break
        else:
            return
        color = _contrasting_color(rng, kind, self.image[mask].mean(axis=0))
        shade = color * rng.uniform(0.35, 0.55)
        slope = np.linspace(1.1, 0.9, mask.shape[0])[:, None, None]
        # Painting only the window that contains the object saves most of the time.
        window = tuple(slice(at.min(), at.max() + 1) for at in np.nonzero(coverage))
        paint = (color + (shade - color) * edge[window][..., None]) * slope[window[:1]]
        self.image[window] += (paint - self.image[window]) * coverage[window][..., None]
        self.owner[mask] = len(self.objects)
        self.objects.append((kind, is_crowd, int(mask.sum())))

    def finish(self) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray]:
        """The return value of :func:`render`."""
        described = []
        for number, (kind, is_crowd, _) in enumerate(self.objects):
            ys, xs = np.nonzero(self.owner == number)
            x, y = int(xs.min()), int(ys.min())
            described.append(
                {
                    "category_id": kind + 1,
                    "bbox": [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y],
                    "area": len(xs),
                    "iscrowd": int(is_crowd),
                }
            )
        return self.image.clip(0, 255).round().astype(np.uint8), described, self.owner

    def _place(self, rng: np.random.Generator, kind: int, sizes: list[float]) -> tuple[np.ndarray, np.ndarray, float]:
        """Coverage and outline, (H, W) in 0..1, at a random position; and the area without the image border."""
        height, width = self.owner.shape
        spread = 2.2 * max(sizes) * math.sqrt(len(sizes) - 1)
        margin = 0.4 * max(sizes)  # small enough that the image border cuts off some shapes
        center = margin + rng.random(2) * (width - 2 * margin, height - 2 * margin)
        fill = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
        line = fill.copy()
        for size in sizes:
            points = _outline(rng, kind) * size + center + rng.uniform(-spread / 2, spread / 2, 2)
            corners = [tuple(point) for point in points * _SUPERSAMPLING]
            ImageDraw.Draw(fill).polygon(corners, fill=255)
            thickness = round(_SUPERSAMPLING * min(max(0.06 * size, 1.0), 3.0))
            ImageDraw.Draw(line).line([*corners, corners[0]], fill=255, width=thickness, joint="curve")
        shapes = [np.asarray(layer.reduce(_SUPERSAMPLING), np.float64) / 255 for layer in (fill, line)]
        return shapes[0], shapes[1], float(np.square(sizes).sum())

    def _leaves_others_visible(self, mask: np.ndarray) -> bool:
        hidden = np.bincount(self.owner[mask] + 1, minlength=len(self.objects) + 1)[1:]
        shown = np.bincount(self.owner.ravel() + 1, minlength=len(self.objects) + 1)[1:]
        return all(left >= 0.5 * full for left, (_, _, full) in zip(shown - hidden, self.objects))


def _outline(rng: np.random.Generator, kind: int) -> np.ndarray:
    """Corners (K, 2) of one shape of area 1 around the origin, with a random rotation and an aspect ratio near 1."""
    if CLASSES[kind] == "circle":
        angles, radii = np.linspace(0, 2 * math.pi, 64, endpoint=False), np.ones(64)
    elif CLASSES[kind] in ("square", "triangle"):
        corners = 4 if CLASSES[kind] == "square" else 3
        # The offset of one half aligns a square with the axes that ``aspect`` stretches.
        angles = (np.arange(corners) + 0.5) * 2 * math.pi / corners
        radii = np.ones(corners)
    elif CLASSES[kind] == "star":
        angles, radii = np.linspace(0, 2 * math.pi, 10, endpoint=False), np.tile([1.0, 0.42], 5)
    else:
        # Four arms, each with two outer corners and the inner corner before the next arm.
        tip, arm = 1.0, 0.3
        quarter = [math.atan2(-arm, tip), math.atan2(arm, tip), math.pi / 4]
        angles = np.concatenate([np.array(quarter) + turn * math.pi / 2 for turn in range(4)])
        radii = np.tile([math.hypot(tip, arm), math.hypot(tip, arm), math.hypot(arm, arm)], 4)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
    aspect = math.exp(rng.uniform(-0.15, 0.15))
    turn = rng.uniform(0, 2 * math.pi)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    x, y = points.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return points / math.sqrt(area) * (aspect, 1 / aspect) @ rotation


def _crowd_sizes(rng: np.random.Generator) -> list[float]:
    return list(rng.uniform(5, 9, rng.integers(12, 22)))


def _contrasting_color(rng: np.random.Generator, kind: int, background: np.ndarray) -> np.ndarray:
    """A saturated color (3,) in 0..255 from the range of its class, in contrast to the mean color of the background.

    The classes' ranges are a fifth of the color circle apart and do not overlap, because a small network needs a long
    time to learn to distinguish the classes by their outlines alone.
    """
    for contrast in range(180, -1, -10):  # lower if the range allows no more, for example on a shape of the same class
        hue = (kind + rng.uniform(-0.45, 0.45)) / len(CLASSES)
        color = 255 * np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.65, 1), rng.uniform(0.6, 1)))
        if np.abs(color - background).sum() > contrast:
            break
    return color


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A texture (H, W, 3) float64 of low saturation in 0..255: a gradient with stripes or clouds, and fine noise."""
    y, x = np.mgrid[:height, :width]
    base = rng.uniform(70, 190) + rng.uniform(-25, 25, 3)
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    background = base + (along / 256)[..., None] * rng.uniform(-50, 50, 3)
    if rng.random() < 0.4:
        pattern = np.sin(along * 2 * math.pi / rng.uniform(8, 40))
    else:
        cells = int(rng.integers(4, 24))
        noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        pattern = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    background += pattern[..., None] * rng.uniform(4, 16) * rng.uniform(0.6, 1.4, 3)
    return background + rng.normal(0, rng.uniform(1, 4), (height, width, 1))


def _write_split(root: Path, split: str, count: int, seed: list[int]) -> None:
    (root / split).mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        pixels, objects, _ = render(np.random.default_rng([*seed, number]))
        file_name = f"{number:06d}.jpg"
        Image.fromarray(pixels).save(root / split / file_name, quality=95)
        height, width = pixels.shape[:2]
        images.append({"id": number, "file_name": file_name, "height": height, "width": width})
        for item in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **item})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _is_complete(root: Path, marker: dict[str, int]) -> bool:
    """Whether ``root`` contains the data set that ``marker`` describes; False if it is missing or empty.

    Raises:
        ArgumentError: it contains something else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / _MARKER).read_text())
    except (OSError, ValueError):
        raise ArgumentError("root", f"={root}: not empty and not a shapes data set; choose another folder") from None
    if found != marker:
        raise ArgumentError(
            "root", f"={root}: contains shapes made with {found}, not {marker}; choose another folder or remove it"
        )
    return True
