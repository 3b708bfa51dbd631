"""The sizes of images whose annotations do not state them."""

from collections.abc import Sequence
from pathlib import Path

from cpm_rcnn.data.threads import in_threads
from cpm_rcnn.errors import UserError


def read_size(folder: Path, file_name: str) -> tuple[int, int]:
    """(height, width) in pixels of an upright image, from its header.

    Args:
        folder: where the image is.
        file_name: its name from there.

    Raises:
        UserError: the image is missing or damaged.
    """
    (size,) = read_sizes(folder, [file_name], progress=False)
    if isinstance(size, str):
        raise UserError(size)
    return size


def read_sizes(folder: Path, file_names: Sequence[str], progress: bool) -> list[tuple[int, int] | str]:
    """:func:`read_size` of many images; for those that cannot be read, a phrase that says why.

    Args:
        folder: where the images are.
        file_names: their names from there.
        progress: show a progress bar on standard error.
    """
    # Imported here, because it imports torch, and most errors in a layout are found without it.
    from cpm_rcnn.data.images import SWAPS_SIDES, ImageSource

    source = ImageSource(folder)

    def size_or_problem(file_name: str) -> tuple[int, int] | str:
        try:
            with source.opened(file_name) as (image, transpose):
                width, height = image.size
        except UserError as error:
            return str(error).removeprefix(f"{source.path}: ")
        return (width, height) if transpose in SWAPS_SIDES else (height, width)

    # A bar for what takes less than a second would only distract.
    progress = progress and len(file_names) > 1000
    return in_threads(size_or_problem, file_names, f"read the image sizes of {folder.name}", progress)
