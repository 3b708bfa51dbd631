"""Comparison of an exported file's detections with those of the model."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpm_rcnn.data.shapes import render
from cpm_rcnn.errors import UserError
from cpm_rcnn.inference.detector import Detector
from cpm_rcnn.inference.export.program import MULTIPLE
from cpm_rcnn.models.detector import TwoStageDetector

BOX_TOLERANCE = 0.05
SCORE_TOLERANCE = 1e-4
# Images of the batch that is compared after each image by itself.
_BATCH = 3
# Runs a file: see BatchDetector for the arguments and results.
Runner = Callable[[Tensor, Tensor], Sequence[Tensor]]


class Comparison(NamedTuple):
    """A comparison that found no difference.

    Attributes:
        images: number of images.
        detections: number of detections in all images.
        box: largest difference of a coordinate in pixels at network size.
        score: largest difference of a score.
    """

    images: int
    detections: int
    box: float
    score: float


def compare(model: TwoStageDetector, run: Runner, images: Mapping[str, Tensor]) -> Comparison:
    """Compare the detections in each image, and in the first three images as one batch.

    Args:
        model: a model in eval mode, on the CPU.
        run: runs the file.
        images: uint8 (3, H, W) at network size, by name.

    Raises:
        UserError: they differ by more than 0.05 pixels or 1e-4, have different labels or numbers, or there are none.
    """
    batches = [[name] for name in images] + ([list(images)[:_BATCH]] if len(images) > 1 else [])
    pairs: list[tuple[Tensor, Tensor]] = []
    for names in batches:
        given = [images[name] for name in names]
        with torch.inference_mode():
            expected = model(given)
        for name, one, other in zip(names, expected, run_batch(run, given), strict=True):
            where = name if len(names) == 1 else f"{name} (in a batch of {len(names)})"
            pairs.append(_differences(where, one, other))
    box, score = (torch.cat(each) for each in zip(*pairs))
    if not len(score):
        raise UserError(
            f"no detections in {len(images)} images, so nothing was compared and nothing is written; "
            "give images with objects, source=FILE_OR_FOLDER"
        )
    single = sum(len(scores) for _, scores in pairs[: len(images)])
    return Comparison(len(images), single, box.max().item(), score.max().item())


def run_batch(run: Runner, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The detections of a file in images, uint8 (3, H, W), as the model returns them."""
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-side // MULTIPLE) * MULTIPLE for side in sizes.amax(dim=0).tolist())
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for row, image in zip(batch, images):
        row[:, : image.shape[-2], : image.shape[-1]] = image
    boxes, scores, labels, counts = run(batch, sizes)
    ends = list(accumulate(counts.tolist()))
    parts = [slice(end - count, end) for end, count in zip(ends, counts.tolist())]
    return [{"boxes": boxes[part], "scores": scores[part], "labels": labels[part]} for part in parts]


def drawn_images(detector: Detector) -> dict[str, Tensor]:
    """Three drawn images by name; after they are resized, they have different sizes."""
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(render(rng)[0].transpose(2, 0, 1).copy()) for _ in range(3)]
    # Parts of two of them, so that the shapes differ whatever the size of the test is.
    cuts = (slice(None), slice(None)), (slice(None), slice(40, 180)), (slice(20, 160), slice(None))
    return {f"drawn image {i}": image[:, y, x] for i, (image, (y, x)) in enumerate(zip(images, cuts), start=1)}


def _differences(name: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Differences of boxes (N,) and scores (N,) of N detections that correspond to each other.

    Detections with almost equal scores may be in another order.

    Raises:
        UserError: a detection has no counterpart; named after the image ``name``.
    """
    box = (expected["boxes"][:, None] - found["boxes"]).abs().amax(dim=2)
    score = (expected["scores"][:, None] - found["scores"]).abs()
    equal = expected["labels"][:, None] == found["labels"]
    close = equal & (box <= BOX_TOLERANCE) & (score <= SCORE_TOLERANCE)
    columns: list[int] = []
    for row in range(len(close)):
        candidates = close[row].nonzero().flatten().tolist()
        column = next((each for each in candidates if each not in columns), None)
        if column is None:
            raise UserError(
                f"{name}: {_difference(row, expected, box[row], score[row], equal[row])}; nothing is written"
            )
        columns.append(column)
    if len(found["scores"]) > len(columns):
        raise UserError(f"{name}: the file has {len(found['scores'])} detections, the model {len(columns)}")
    rows = torch.arange(len(columns))
    return box[rows, columns], score[rows, columns]


def _difference(row: int, expected: Mapping[str, Tensor], box: Tensor, score: Tensor, equal: Tensor) -> str:
    """How the detection in a row differs from the nearest one of the file."""
    label, value = int(expected["labels"][row]), float(expected["scores"][row])
    text = f"detection {row + 1} of {len(expected['scores'])} (label {label}, score {value:.4f})"
    if not equal.any():
        return f"{text} is missing in the file"
    # Nearest in tolerances.
    distance = torch.maximum(box / BOX_TOLERANCE, score / SCORE_TOLERANCE).masked_fill(~equal, torch.inf)
    best = distance.argmin()
    if distance[best] <= 1:
        return f"{text} is one of several that are equal within the tolerances, and the file has fewer of them"
    return (
        f"{text} differs by {box[best]:.3g} pixels and {score[best]:.2g} from the nearest one of the file; allowed are "
        f"{BOX_TOLERANCE} and {SCORE_TOLERANCE}"
    )
