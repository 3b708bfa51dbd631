"""Settings of the data modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.settings import Settings, choice, flag, inference, integer, list_of, number, optional, text, training

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class DataSettings(Settings):
    """Settings of :class:`~cpm_rcnn.data.CocoDataModule`.

    Relative paths start from ``root``. A split can only be used if its two paths are set.

    Attributes:
        root: folder of the data set; None is the current working directory.
        train_json: COCO-style annotations of the training split.
        train_images: folder or .zip file with its images.
        val_json: COCO-style annotations of the validation split.
        val_images: folder or .zip file with its images.
        test_json: COCO-style annotations of the test split, or only its list of images (COCO's test-dev).
        test_images: folder or .zip file with its images.
        eval_batch_size: images per step and process in validation and test.
        num_workers: worker processes of each loader; 0 loads in the main process.
        short_sides: lengths in pixels of the image's shorter side, one of which is drawn for each training sample.
        max_size: maximum length in pixels of the longer side in training.
        test_short_side: length in pixels of the shorter side in validation and test; None keeps the original size.
        test_max_size: maximum length in pixels of the longer side in validation and test.
        resize_rounding: whether the sides of a resized training image are rounded to the ``nearest`` whole pixel or
            ``down``. Validation and test round to the nearest.
        flip_probability: probability of a horizontal flip in training.
        min_box_size: objects whose width or height inside the image is at most this many pixels are not used in
            training, as are images without other objects.
        batch_orientation: which images have the same orientation: those of a ``step``, over all processes, or those of
            a ``process`` in a step. With ``process``, square images count as portrait.
        on_error: ``raise`` stops at the first invalid annotation file or image; ``skip`` skips invalid images and
            annotations and logs a warning with their number (see :meth:`CocoAnnotations.load
            <cpm_rcnn.data.CocoAnnotations.load>` and :class:`~cpm_rcnn.data.CocoDataset`).
        check_images: before the first step, open every image that is used and check its format and size, instead of
            only whether it exists.
    """

    root: str | None = inference(None, check=optional(text))
    train_json: str | None = training(None, check=optional(text))
    train_images: str | None = training(None, check=optional(text))
    val_json: str | None = inference(None, check=optional(text))
    val_images: str | None = inference(None, check=optional(text))
    test_json: str | None = inference(None, check=optional(text))
    test_images: str | None = inference(None, check=optional(text))
    eval_batch_size: int = inference(1, check=integer())
    num_workers: int = inference(2, check=integer(0))
    short_sides: Sequence[int] = training((800,), check=list_of(integer()))
    max_size: int = training(1333, check=integer())
    test_short_side: int | None = inference(800, check=optional(integer()))
    test_max_size: int = inference(1333, check=integer())
    resize_rounding: str = training("nearest", check=choice("nearest", "down"))
    flip_probability: float = training(0.5, check=number(0, 1))
    min_box_size: float = training(0.0, check=number(0))
    batch_orientation: str = training("step", check=choice("step", "process"))
    on_error: OnError = inference("raise", check=choice("raise", "skip"))
    check_images: bool = inference(False, check=flag)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_size < min(self.short_sides):
            raise ArgumentError("max_size", f"={self.max_size}: must be at least short_sides, {list(self.short_sides)}")
        if self.test_short_side is not None and self.test_max_size < self.test_short_side:
            raise ArgumentError(
                "test_max_size", f"={self.test_max_size}: must be at least test_short_side, {self.test_short_side}"
            )


@dataclass(frozen=True)
class ShapesSettings(DataSettings):
    """Settings of :class:`~cpm_rcnn.data.ShapesDataModule`, which sets the paths of the splits itself.

    Attributes:
        root: folder to render the data set into; it is created if needed.
        train_count: number of training images.
        val_count: number of validation images.
    """

    root: str = inference("data/shapes", check=text)
    train_count: int = training(600, check=integer())
    val_count: int = training(100, check=integer())
