"""Settings of the data modules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cpm_rcnn.data.classes import check_classes
from cpm_rcnn.errors import ArgumentError, shown
from cpm_rcnn.remote.urls import check_url, is_url
from cpm_rcnn.settings import (
    Check,
    Settings,
    choice,
    flag,
    inference,
    integer,
    list_of,
    number,
    optional,
    text,
    training,
)

OnError = Literal["raise", "skip"]
Split = Literal["train", "val", "test"]
FORMATS = ("coco", "yolo", "voc", "cvat")
AUGMENT = ("flip", "standard", "strong")
# One cell of the coarsest level of the feature pyramid.
_MIN_TILE = 64


def _below(limit: float) -> Check:
    """A number of at least 0 and below ``limit``."""

    def check(argument: str, value: Any) -> None:
        number(0, limit)(argument, value)
        if value == limit:
            raise ArgumentError(argument, f"={shown(value)}: must be below {limit:g}")

    return check


def check_tile(argument: str, value: Any) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a valid side of tiles in pixels, or None for no tiles."""
    optional(integer(_MIN_TILE))(argument, value)


def check_tile_overlap(argument: str, value: Any) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a valid overlap of tiles as a part of their sides."""
    _below(0.9)(argument, value)


def _path(argument: str, value: Any) -> None:
    """A local path or a URL."""
    text(argument, value)
    check_url(argument, value)


def _local_path(argument: str, value: Any) -> None:
    """A local path."""
    text(argument, value)
    if is_url(value):
        raise ArgumentError(argument, f"={value}: must be a local folder, into which the images are rendered")


@dataclass(frozen=True)
class DataSettings(Settings):
    """Settings of :class:`~cpm_rcnn.data.CocoDataModule`.

    Paths may be URLs (:mod:`cpm_rcnn.remote`), and relative paths start from ``root``. If neither ``train_json`` nor
    ``val_json`` is set, the annotations and images of all splits are found in ``root``, which must then be local
    (:mod:`cpm_rcnn.data.formats`). Otherwise, a split can only be used if its two paths are set.

    Attributes:
        root: folder of the data set; None is the current working directory.
        train_json: COCO-style annotations of the training split.
        train_images: folder or .zip file with its images.
        val_json: COCO-style annotations of the validation split.
        val_images: folder or .zip file with its images.
        test_json: COCO-style annotations of the test split, or only its list of images (COCO's test-dev).
        test_images: folder or .zip file with its images.
        format: format of the annotations in ``root``, one of :data:`FORMATS`; ``auto`` recognizes it.
        classes: the classes to detect, in the order of their labels: a list of names, and of ``{new: old}`` or
            ``{new: [old, ...]}`` for classes with another name (:class:`~cpm_rcnn.data.classes.ClassSelection`).
            Objects of other classes are left out. None keeps the classes of the training annotations.
        val_fraction: part of the training images, above 0 and below 1, that become the validation split of a data set
            without one. Images that look alike stay together (:mod:`cpm_rcnn.data.holdout`). None holds out nothing.
        split_seed: random seed of that choice. It does not depend on the seed of the run.
        negatives: share of the training images, at least 0 and below 1, that are images without objects
            (:class:`~cpm_rcnn.data.samplers.TrainOrder`). With 0, such images are not used in training.
        tile: side in pixels of the overlapping tiles into which larger images are cut before they are resized. In
            training, each tile is an image (:class:`~cpm_rcnn.data.tiles.Tiles`); in validation and test, the
            detections in the tiles are merged (:class:`~cpm_rcnn.inference.tiles.TiledDetector`). None keeps whole
            images.
        tile_overlap: smallest overlap of neighboring tiles, as a part of their sides, at least 0 and below 0.9.
        eval_batch_size: images per step and process in validation and test.
        num_workers: worker processes of each loader; 0 loads in the main process.
        short_sides: lengths in pixels of the shorter side of an image or tile, one of which is drawn for each training
            sample.
        max_size: maximum length in pixels of the longer side in training.
        test_short_side: length in pixels of the shorter side in validation and test; None keeps the original size.
        test_max_size: maximum length in pixels of the longer side in validation and test.
        resize_rounding: whether the sides of a resized training image are rounded to the ``nearest`` whole pixel or
            ``down``. Validation and test round to the nearest.
        flip_probability: probability of a horizontal flip in training.
        augment: the other training augmentations, one of :data:`AUGMENT`
            (:func:`~cpm_rcnn.data.presets.training_augmentations`).
        quarter_turns: turn training images by random multiples of 90 degrees; for images without an upright direction.
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

    root: str | None = inference(None, check=optional(_path))
    # Those of the training images are needed in an evaluation too, if the validation images are a part of them.
    train_json: str | None = inference(None, check=optional(_path))
    train_images: str | None = inference(None, check=optional(_path))
    val_json: str | None = inference(None, check=optional(_path))
    val_images: str | None = inference(None, check=optional(_path))
    test_json: str | None = inference(None, check=optional(_path))
    test_images: str | None = inference(None, check=optional(_path))
    format: str = inference("auto", check=choice("auto", *FORMATS))
    classes: Sequence[str | Mapping[str, Any]] | None = inference(None, check=optional(check_classes))
    val_fraction: float | None = inference(None, check=optional(_below(1)))
    split_seed: int = inference(0, check=integer(0))
    negatives: float = training(0.0, check=_below(1))
    # Training uses them too; a checkpoint is tested with the tiles that it was trained with.
    tile: int | None = inference(None, check=check_tile)
    tile_overlap: float = inference(0.2, check=check_tile_overlap)
    eval_batch_size: int = inference(1, check=integer())
    num_workers: int = inference(2, check=integer(0))
    short_sides: Sequence[int] = training((800,), check=list_of(integer()))
    max_size: int = training(1333, check=integer())
    test_short_side: int | None = inference(800, check=optional(integer()))
    test_max_size: int = inference(1333, check=integer())
    resize_rounding: str = training("nearest", check=choice("nearest", "down"))
    flip_probability: float = training(0.5, check=number(0, 1))
    augment: str = training("flip", check=choice(*AUGMENT))
    quarter_turns: bool = training(False, check=flag)
    min_box_size: float = training(0.0, check=number(0))
    batch_orientation: str = training("step", check=choice("step", "process"))
    on_error: OnError = inference("raise", check=choice("raise", "skip"))
    check_images: bool = inference(False, check=flag)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_fraction == 0:
            raise ArgumentError("val_fraction", "=0: must be above 0; null holds out nothing")
        if self.val_fraction is not None and self.val_json is not None:
            raise ArgumentError(
                "val_fraction", f"={self.val_fraction}: val_json={self.val_json} names a validation split already"
            )
        if self.format in FORMATS[1:] and (self.train_json or self.val_json):
            given = "train_json" if self.train_json else "val_json"
            raise ArgumentError("format", f"={self.format}: {given} names a COCO-style json; give only one of them")
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

    root: str = inference("data/shapes", check=_local_path)
    train_count: int = training(600, check=integer())
    val_count: int = training(100, check=integer())
