"""Objects whose boxes are small, long, as large as the image, or repeated, and images without objects."""

from collections.abc import Sequence

import numpy as np

from cpm_rcnn.data.doctor.checked_split import CheckedSplit
from cpm_rcnn.data.doctor.finding import EXAMPLES, Finding, Severity, percent
from cpm_rcnn.data.problem import counted

# Square root of the area in pixels of the network's input below which an object has hardly any features: two cells of
# the finest level of the pyramid on each side. If more than this share of the objects is smaller, it is a warning.
SMALL, _MANY_SMALL = 8, 0.05
# The longer side of a box divided by the shorter one.
LONG = 20
# The share of an image's width, and of its height, that a box of the whole image covers.
_WHOLE = 0.99
# IoU of two boxes of one object.
SAME_IOU = 0.95
# Share of the images of a split without objects from which on they may be images that were not annotated.
_MANY_EMPTY = 0.1


def object_findings(splits: Sequence[CheckedSplit]) -> list[Finding]:
    """The findings about single boxes of all splits, and about images without objects."""
    checks = (_repeated, _whole_image, _long, _small, _empty)
    return [finding for check in checks for split in splits for finding in check(split)]


def repeated_boxes(split: CheckedSplit) -> tuple[np.ndarray, np.ndarray]:
    """Used objects that repeat another one of the same image and class, and one that each repeats, (R,) int64 each."""
    # In the order of image, class and left edge. Boxes with a large IoU have nearly the same left edge, so each one is
    # compared with the next ones only, as long as any can be similar.
    boxes, group = split.boxes, split.image_rows * (len(split.annotations.category_ids) + 1) + split.labels
    order = np.lexsort((boxes[:, 0], group))
    sorted_boxes, sorted_group = boxes[order], group[order]
    # Where the next ones start at most: the width of the intersection is at least SAME_IOU of that of the union.
    reach = sorted_boxes[:, 0] + (1 / SAME_IOU - 1) * (sorted_boxes[:, 2] - sorted_boxes[:, 0])
    active = np.arange(len(order))
    repeats, originals = [], []
    distance = 1
    while len(active := active[active + distance < len(order)]):
        other = active + distance
        near = (sorted_group[active] == sorted_group[other]) & (sorted_boxes[other, 0] <= reach[active])
        active, other = active[near], other[near]
        same = _iou(sorted_boxes[active], sorted_boxes[other]) > SAME_IOU
        pair = np.sort(order[np.stack([active[same], other[same]])], axis=0)
        originals.append(pair[0])
        repeats.append(pair[1])
        distance += 1
    if not repeats:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    every, first = np.concatenate(repeats), np.concatenate(originals)
    unique, index = np.unique(every, return_index=True)
    return unique, first[index]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,) IoU of boxes (N, 4) xyxy with others (N, 4)."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = sides.clip(min=0).prod(axis=1)
    return intersection / (_area(a) + _area(b) - intersection)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)


def _repeated(split: CheckedSplit) -> list[Finding]:
    repeats, originals = repeated_boxes(split)
    if not len(repeats):
        return []
    name = split.annotations.number_format.format
    examples = []
    for repeat, original in zip(repeats[:EXAMPLES].tolist(), originals.tolist()):
        detail = f"as {name(split.annotations.numbers[split.objects[original]])}"
        examples.append(split.object_example(repeat, detail, [original]))
    sentence = (
        f"{counted(len(repeats), 'box repeats', 'boxes repeat')} another one of the same class and image in the "
        f"{split.name} split (IoU above {SAME_IOU})."
    )
    advice = "Remove one of each pair: the model is trained and rated on objects that do not exist."
    return [Finding("warning", "duplicate boxes", sentence, len(repeats), tuple(examples), advice)]


def _whole_image(split: CheckedSplit) -> list[Finding]:
    sizes = np.stack([split.annotations.widths, split.annotations.heights], axis=1)[split.image_rows]
    whole = (split.boxes[:, 2:] - split.boxes[:, :2] >= _WHOLE * sizes).all(axis=1)
    sentence = "{} the whole image in the {} split."
    advice = "Check that these are not labels of images that were converted to boxes."
    return _about(split, whole, "warning", "box of the whole image", sentence, ("box covers", "boxes cover"), advice)


def _long(split: CheckedSplit) -> list[Finding]:
    sides = split.boxes[:, 2:] - split.boxes[:, :2]
    long = sides.max(axis=1) > LONG * sides.min(axis=1)
    sentence = f"{{}} more than {LONG} times as long as wide, or the reverse, in the {{}} split."
    advice = "Check the boxes; anchors have aspect ratios from 1:2 to 2:1."
    return _about(split, long, "warning", "aspect ratio", sentence, ("box is", "boxes are"), advice)


def _small(split: CheckedSplit) -> list[Finding]:
    small = _area(split.input_boxes) < SMALL**2
    share = percent(int(small.sum()), len(small))
    sentence = f"{{}} smaller than {SMALL} x {SMALL} pixels at the network's size in the {{}} split."
    sizes = "short_sides=[...], max_size=..." if split.name == "train" else "test_short_side=..., test_max_size=..."
    advice = f"Enlarge the images ({sizes}), or train on parts of them."
    severity: Severity = "warning" if small.sum() > _MANY_SMALL * len(small) else "note"
    nouns = (f"object ({share}) is", f"objects ({share}) are")
    return _about(split, small, severity, "small objects", sentence, nouns, advice, split.input_boxes)


def _about(
    split: CheckedSplit,
    which: np.ndarray,
    severity: Severity,
    kind: str,
    sentence: str,
    nouns: tuple[str, str],
    advice: str,
    sized: np.ndarray | None = None,
) -> list[Finding]:
    """A finding about the used objects under ``which`` (U,) bool, with the sizes of the boxes ``sized`` (U, 4)."""
    rows = np.flatnonzero(which)
    if not len(rows):
        return []
    boxes = split.boxes if sized is None else sized
    examples = []
    for row in rows[:EXAMPLES].tolist():
        width, height = (boxes[row, 2:] - boxes[row, :2]).tolist()
        examples.append(split.object_example(row, f"{width:.0f} x {height:.0f} pixels"))
    text = sentence.format(counted(len(rows), *nouns), split.name)
    return [Finding(severity, kind, text, len(rows), tuple(examples), advice)]


def _empty(split: CheckedSplit) -> list[Finding]:
    rows = split.annotations.images_without_objects()
    if not split.annotations.has_annotations or len(rows) < _MANY_EMPTY * len(split.annotations):
        return []
    sentence = (
        f"{counted(len(rows), 'image', 'images')} of {len(split.annotations)} in the {split.name} split "
        f"({percent(len(rows), len(split.annotations))}) have no objects."
    )
    use = " To train on images without objects, set negatives=0.1." if split.name == "train" else ""
    advice = f"Check that they were annotated.{use}"
    return [Finding("warning", "images without objects", sentence, len(rows), split.first_images(rows), advice)]
