"""The data modules: which files are read, and how they become batches, in which order."""

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from cpm_rcnn.boxes import CONVENTIONS
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.dataset import CocoDataset, ImageFaults
from cpm_rcnn.data.file_check import check_image_files, describe_problems, shared_images
from cpm_rcnn.data.jpeg import has_fast_decoder
from cpm_rcnn.data.mixing import MixingAugmentation
from cpm_rcnn.data.presets import training_augmentations
from cpm_rcnn.data.problem import counted
from cpm_rcnn.data.samplers import EvalSampler, Negatives, TrainBatchSampler, TrainOrder, collate
from cpm_rcnn.data.settings import DataSettings, ShapesSettings, Split
from cpm_rcnn.data.shapes import CATEGORIES, write_shapes
from cpm_rcnn.data.splits import DataSplits
from cpm_rcnn.data.tiles import Tiles
from cpm_rcnn.data.transforms import Augmentation, Resize
from cpm_rcnn.data.worker_batches import CollateForMainProcess
from cpm_rcnn.errors import ArgumentError, UserError, check_choice, check_count, check_range
from cpm_rcnn.remote.urls import Location, Url

_log = logging.getLogger(__name__)


def _is_first_rank() -> bool:
    """Whether this is the only process or the one of rank 0; also before a Trainer is attached."""
    return getattr(rank_zero_only, "rank", 0) == 0


class CocoDataModule(pl.LightningDataModule):
    """A data set on disk, in COCO's or another format (:mod:`cpm_rcnn.data.formats`).

    Its loaders shard by rank themselves, so the Trainer needs ``use_distributed_sampler=False``. They yield batches of
    :class:`~cpm_rcnn.data.CocoDataset` as :func:`~cpm_rcnn.data.samplers.collate` builds them. No file is read before
    it is needed. Before a Trainer's first step, :meth:`setup` checks that all images exist; of a remote folder, only
    that the first one does.

    Args:
        categories: the categories of the labels, each with ``id`` and ``name``. None takes them from the settings or
            the annotations (:class:`~cpm_rcnn.data.splits.DataSplits`).
        batch_size: training images per step and process.
        max_steps: number of batches of the whole run; only training needs it.
        seed: random seed of the order and the augmentations, 0 to 2**32 - 1.
        convention: name of the convention of the targets' boxes, ``continuous`` or ``inclusive``.
        **settings: fields of :class:`~cpm_rcnn.data.DataSettings`.

    Attributes:
        settings: the settings.
        splits: the annotations and images of the splits.
        train_augmentations: augmentations that are applied in training. To add your own, change this list before the
            loader is built.
        eval_augmentations: augmentations that are applied in validation and test; they may only resize.
        start_step: first step that the training loader yields; a resumed run sets it.

    Raises:
        ArgumentError: an argument has the wrong type or is out of range.
    """

    settings_class: type[DataSettings] = DataSettings

    def __init__(
        self,
        *,
        categories: Sequence[dict[str, Any]] | None = None,
        batch_size: int = 2,
        max_steps: int | None = None,
        seed: int = 0,
        convention: str = "continuous",
        **settings: Any,
    ) -> None:
        super().__init__()
        check_count("batch_size", batch_size)
        if max_steps is not None:
            check_count("max_steps", max_steps)
        check_range("seed", seed, 0, 2**32 - 1)
        check_choice("convention", convention, CONVENTIONS)
        self.settings = self.settings_class.from_dict(settings)
        self.splits = DataSplits(self.settings, categories)
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.seed = seed
        self.convention = CONVENTIONS[convention]
        self.start_step = 0
        self.train_augmentations = training_augmentations(self.settings, self.convention)
        # With tiles, the detector resizes: it resizes the tiles.
        test_short_side = self.settings.test_short_side if self.settings.tile is None else None
        self.eval_augmentations: list[Augmentation] = [Resize(test_short_side, self.settings.test_max_size)]
        self._faults: dict[str, ImageFaults] = {}
        self._checked: set[str] = set()
        self._tiles: Tiles | None = None

    @property
    def evaluation_arguments(self) -> dict[str, Any]:
        """The settings that evaluation depends on, as plain values; a checkpoint stores them.

        Together with ``categories`` and ``convention``, they are the arguments of a :class:`CocoDataModule` with the
        same validation and test data. ``root`` is absolute, since evaluation may run in another folder.
        """
        values = self.settings.to_dict()
        root = self.root.text if isinstance(self.root, Url) else str(self.root.absolute())
        return {name: values[name] for name in DataSettings.names("inference")} | {"root": root}

    @property
    def root(self) -> Location:
        """``settings.root`` as a URL, or as a path with ``~`` expanded."""
        return self.splits.root

    @property
    def categories(self) -> list[dict[str, Any]]:
        """``{"id": .., "name": ..}`` by ascending id; label ``k + 1`` stands for item k.

        Raises:
            UserError: the annotations that define them are missing or invalid.
        """
        return self.splits.categories

    def annotations(self, split: Split) -> CocoAnnotations:
        """The annotations of a split; its files are read at the first call.

        Raises:
            UserError: there is no such split, or a file is missing or invalid.
        """
        return self.splits.annotations(split, progress=_is_first_rank())

    @property
    def num_training_images(self) -> int:
        """Number of images with an object to train on, or with ``tile``, of tiles.

        Raises:
            UserError: the annotations are missing or invalid.
        """
        return len(self.training_annotations.images_with_objects())

    @property
    def training_annotations(self) -> CocoAnnotations:
        """The annotations of what training takes for images: the images of the training split, or their tiles.

        Raises:
            UserError: the annotations are missing or invalid.
        """
        tiles = self._training_tiles()
        return self.annotations("train") if tiles is None else tiles.annotations

    def _training_tiles(self) -> Tiles | None:
        """The tiles of the training split; None if images are not cut into tiles."""
        settings = self.settings
        if self._tiles is None and settings.tile is not None:
            whole = self.annotations("train")
            self._tiles = Tiles.of(whole, settings.tile, settings.tile_overlap, settings.min_box_size)
        return self._tiles

    def images_folder(self, split: Split) -> Location | None:
        """The folder of a split's images, which may be a zip file of that name; None if none is given."""
        return self.splits.images_folder(split)

    def setup(self, stage: str) -> None:
        """Check that the images of all splits of a stage exist, and with ``check_images`` their headers.

        Only the images that training uses are checked in the training split. A Trainer calls this in every process.

        Args:
            stage: Lightning's name of what follows: ``fit`` (the training and validation splits), ``validate`` or
                ``test``.

        Raises:
            UserError: a file is missing or invalid; an image is, or with ``on_error=skip``, all are.
            UnavailableError: the server of remote files refuses or does not answer.
        """
        if "decoder" not in self._checked:
            self._checked.add("decoder")
            if _is_first_rank() and not has_fast_decoder():
                _log.warning("simplejpeg is not installed, so JPEGs are decoded by Pillow, which takes longer")
        stages: dict[str, list[Split]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}
        splits = stages.get(stage, [])
        if stage == "fit":
            # From Python, a run may do without one of the splits.
            splits = [split for split in splits if self.splits.has(split)]
        for split in splits:
            if split not in self._checked:
                self._check_images(split)
                self._checked.add(split)
        if len(splits) == 2 and "overlap" not in self._checked:
            self._warn_of_overlap()
            self._checked.add("overlap")

    def _check_images(self, split: Split) -> None:
        annotations, images = self.annotations(split), self.splits.images(split)
        rows = self._rows_of_training_images() if split == "train" else np.arange(len(annotations))
        first_rank = _is_first_rank()
        problems = check_image_files(annotations, rows, images, self.settings.check_images, progress=first_rank)
        if not problems:
            return
        described = f"{images.path}: {describe_problems(problems, len(rows))}, which {annotations.path} lists"
        if len(problems) == len(rows):
            if getattr(self.settings, f"{split}_images") is None:
                raise UserError(described)
            raise ArgumentError(
                f"{split}_images", f"={described}; must be the folder or .zip that its file names start from"
            )
        if self.settings.on_error == "raise":
            raise UserError(f"{described}; correct them, or skip these images with on_error=skip")
        self._faults_of(split).unreadable[list(problems)] = True
        if first_rank:
            consequence = "replaced by other images" if split == "train" else "treated as images without detections"
            _log.warning("%s; %s (on_error=skip)", described, consequence)

    def _warn_of_overlap(self) -> None:
        if not _is_first_rank():
            return
        if self.settings.val_fraction is not None:
            return
        train, val = self.annotations("train"), self.annotations("val")
        reason = "the validation metrics will not show how well the model generalizes"
        if train.path.resolve() == val.path.resolve() and np.array_equal(train.file_names, val.file_names):
            _log.warning("%s is used for training and for validation; %s", val.path, reason)
            return
        count, first = shared_images((train, self.splits.images("train")), (val, self.splits.images("val")))
        if count:
            total = counted(len(val), "validation image", "validation images")
            _log.warning("%d of %s are also training images (%s, ...); %s", count, total, first, reason)

    def _faults_of(self, split: Split) -> ImageFaults:
        """The faults that all loaders of a split share, so that each is reported once."""
        if split not in self._faults:
            self._faults[split] = ImageFaults.none(len(self.annotations(split)))
        return self._faults[split]

    def train_dataloader(self) -> DataLoader:
        """Training batches from ``start_step`` to ``max_steps``.

        They are of the images with at least one usable object, and with ``negatives`` also of those without any object.
        With ``tile``, they are of tiles instead of images.

        Raises:
            UserError: a file is missing or invalid, no image has a usable object, or with ``negatives``, all have one.
        """
        annotations = self.training_annotations
        rows = annotations.images_with_objects()
        if len(rows) == 0:
            small = f" or boxes of at most {self.settings.min_box_size:g} pixels" if self.settings.min_box_size else ""
            raise UserError(f"{annotations.path}: no image has an object to train on (crowds{small} do not count)")
        if self.max_steps is None:
            raise ArgumentError("max_steps", "=None: training needs the number of steps")
        rank, world_size = self._rank()
        per_process = self.settings.batch_orientation == "process"
        portrait = annotations.portrait | annotations.square if per_process else annotations.portrait
        negatives = None
        if self.settings.negatives:
            empty = self._negative_rows()
            if not np.isin(portrait[empty], portrait[rows]).any():
                reason = "the images without objects do not have the orientation of the others"
                raise ArgumentError("negatives", f"={self.settings.negatives}: {annotations.path}: {reason}")
            negatives = Negatives(empty, portrait[empty], self.settings.negatives)
        order = TrainOrder(rows, portrait[rows], self.seed, self.batch_size, world_size, per_process, negatives)
        sampler = TrainBatchSampler(order, rank, self.start_step, self.max_steps)
        used = self._training_rows()
        return self._loader("train", self.train_augmentations, used, self._training_tiles(), batch_sampler=sampler)

    def _rows_of_training_images(self) -> np.ndarray:
        """The ascending rows (int64) of the images that are used in training, whole or in tiles."""
        rows, tiles = self._training_rows(), self._training_tiles()
        return rows if tiles is None else np.unique(tiles.images[rows])

    def _training_rows(self) -> np.ndarray:
        """The ascending rows (int64) of all images or tiles that are used in training."""
        with_objects = self.training_annotations.images_with_objects()
        return np.union1d(with_objects, self._negative_rows()) if self.settings.negatives else with_objects

    def _negative_rows(self) -> np.ndarray:
        """The rows (int64) of the training images or tiles without objects.

        Raises:
            ArgumentError: there are none.
        """
        annotations = self.training_annotations
        rows = annotations.images_without_objects()
        if len(rows) == 0:
            unit = "image" if self.settings.tile is None else "tile"
            raise ArgumentError(
                "negatives", f"={self.settings.negatives}: {annotations.path} has no {unit} without objects"
            )
        return rows

    def val_dataloader(self) -> DataLoader:
        """All images of the validation split, in the json's order.

        Raises:
            UserError: a file is missing or invalid.
        """
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """All images of the test split, in the json's order.

        Raises:
            UserError: a file is missing or invalid, or no test split is configured.
        """
        return self._eval_loader("test")

    def _eval_loader(self, split: Split) -> DataLoader:
        sampler = EvalSampler(len(self.annotations(split)), *self._rank())
        return self._loader(split, self.eval_augmentations, sampler=sampler, batch_size=self.settings.eval_batch_size)

    def _loader(
        self,
        split: Split,
        augmentations: Sequence[Augmentation | MixingAugmentation],
        replacements: np.ndarray | None = None,
        tiles: Tiles | None = None,
        **batching: Any,
    ) -> DataLoader:
        dataset = CocoDataset(
            self.annotations(split),
            self.splits.images(split),
            augmentations,
            self.convention,
            self.seed,
            self.settings.on_error,
            replacements,
            self._faults_of(split),
            tiles,
        )
        return DataLoader(
            dataset,
            num_workers=self.settings.num_workers,
            persistent_workers=self.settings.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_signals,
            collate_fn=CollateForMainProcess(collate) if self.settings.num_workers else collate,
            **batching,
        )

    def _rank(self) -> tuple[int, int]:
        """The rank of this process and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _ignore_signals(worker: int) -> None:
    """Leave signals that a terminal or a cluster sends to all processes to the main process, which saves the run."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class ShapesDataModule(CocoDataModule):
    """The built-in data set of synthetic shapes, rendered into ``root`` on first use.

    Args:
        **arguments: arguments of :class:`CocoDataModule` except ``categories`` and the paths of the splits, and
            the fields of :class:`~cpm_rcnn.data.settings.ShapesSettings`.

    Raises:
        ArgumentError: an argument has the wrong type or is out of range.
    """

    settings_class = ShapesSettings
    settings: ShapesSettings

    def __init__(self, **arguments: Any) -> None:
        super().__init__(
            train_json="annotations/instances_train.json",
            train_images="train",
            val_json="annotations/instances_val.json",
            val_images="val",
            # Known before the data set is rendered.
            categories=CATEGORIES if arguments.get("classes") is None else None,
            **arguments,
        )

    def prepare_data(self) -> None:
        """Render the data set unless it exists.

        Raises:
            ArgumentError: ``root`` contains something else.
        """
        write_shapes(Path(self.settings.root).expanduser(), self.settings.train_count, self.settings.val_count)
