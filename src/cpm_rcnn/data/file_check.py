"""Checks that the images of a split exist, before the first batch is read."""

from collections.abc import Mapping
from os.path import normpath

import numpy as np

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.problem import counted
from cpm_rcnn.data.threads import in_threads


def check_image_files(
    annotations: CocoAnnotations, rows: np.ndarray, images: ImageSource, headers: bool = False, progress: bool = True
) -> dict[int, str]:
    """Find the images that are missing, by listing the folder or the archive once.

    Args:
        annotations: annotations of the split.
        rows: rows (int64) of the images that are used.
        images: where the files are.
        headers: also open every file that exists and check its format and size.
        progress: show a progress bar on standard error while headers are read.

    Returns:
        From the row of each image that cannot be read to a phrase that says why.
    """
    names = annotations.file_names[rows].tolist()
    problems = {int(rows[position]): why for position, why in images.missing(names).items()}
    if headers:
        existing = [row for row in rows.tolist() if row not in problems]

        def problem_of(row: int) -> str | None:
            size = int(annotations.heights[row]), int(annotations.widths[row])
            return images.header_problem(str(annotations.file_names[row]), size)

        found = in_threads(problem_of, existing, f"check images of {annotations.path.name}", progress)
        problems |= {row: why for row, why in zip(existing, found) if why is not None}
    return problems


def describe_problems(problems: Mapping[int, str], total: int) -> str:
    """For example "2 of 8 images cannot be read (image a.jpg not found, b.jpg is empty, a file of 0 bytes)"."""
    first = ", ".join(problems[row] for row in sorted(problems)[:3]) + ", ..." * (len(problems) > 3)
    return f"{len(problems)} of {counted(total, 'image', 'images')} cannot be read ({first})"


def shared_images(
    train: tuple[CocoAnnotations, ImageSource], val: tuple[CocoAnnotations, ImageSource]
) -> tuple[int, str]:
    """How many validation images are training images, and the name of the first one ("" if there is none)."""
    if train[1].path.resolve() != val[1].path.resolve():
        return 0, ""
    seen = set(map(_normalized, train[0].file_names.tolist()))
    shared = [name for name in val[0].file_names.tolist() if _normalized(name) in seen]
    return len(shared), shared[0] if shared else ""


def _normalized(file_name: str) -> str:
    return normpath(file_name.replace("\\", "/"))
