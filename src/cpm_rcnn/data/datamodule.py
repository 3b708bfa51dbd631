"""The data modules: which files are read, and how they become batches, in which order."""

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from cpm_rcnn.boxes import CONVENTIONS
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.dataset import CocoDataset, ImageFaults
from cpm_rcnn.data.file_check import check_image_files, describe_problems, shared_images
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.samplers import EvalSampler, TrainBatchSampler, TrainOrder, collate
from cpm_rcnn.data.settings import DataSettings, ShapesSettings
from cpm_rcnn.data.shapes import CATEGORIES, write_shapes
from cpm_rcnn.data.transforms import Augmentation, RandomFlip, RandomResize, Resize
from cpm_rcnn.data.validation import check_categories, counted
from cpm_rcnn.data.worker_batches import to_send
from cpm_rcnn.errors import ArgumentError, UserError, check_choice, check_count, check_range

Split = Literal["train", "val", "test"]

_log = logging.getLogger(__name__)

# COCO's own names, and where its files are.
_COCO_FILES = {
    *(f"annotations/{name}.json" for name in ("instances_train2017", "instances_val2017", "image_info_test-dev2017")),
    *("train2017", "val2017", "test2017"),
}
_COCO_SOURCE = " (COCO 2017: Train/Val images and annotations from https://cocodataset.org/#download)"


def _is_first_rank() -> bool:
    """Whether this is the only process or the one of rank 0; also before a Trainer is attached."""
    return getattr(rank_zero_only, "rank", 0) == 0


class CocoDataModule(pl.LightningDataModule):
    """A COCO-style data set on disk.

    Its loaders shard by rank themselves, so the Trainer needs ``use_distributed_sampler=False``. They yield batches of
    :class:`~cpm_rcnn.data.CocoDataset` as :func:`~cpm_rcnn.data.samplers.collate` builds them. No file is read before
    it is needed. Before a Trainer's first step, :meth:`setup` checks that all images exist.

    Args:
        categories: the categories of the labels, each with ``id`` and ``name``. None takes them from ``train_json``, or
            from ``val_json`` if there is no ``train_json``.
        batch_size: training images per step and process.
        max_steps: number of batches of the whole run; only training needs it.
        seed: random seed of the order and the augmentations, 0 to 2**32 - 1.
        convention: name of the convention of the targets' boxes, ``continuous`` or ``inclusive``.
        **settings: fields of :class:`~cpm_rcnn.data.DataSettings`.

    Attributes:
        settings: the settings.
        root: ``settings.root`` as a path, with ``~`` expanded.
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
        self.root = Path(self.settings.root or "").expanduser()
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.seed = seed
        self.convention = CONVENTIONS[convention]
        self.start_step = 0
        self.train_augmentations: list[Augmentation] = [
            RandomResize(self.settings.short_sides, self.settings.max_size, self.settings.resize_rounding),
            RandomFlip(self.settings.flip_probability, self.convention),
        ]
        self.eval_augmentations: list[Augmentation] = [
            Resize(self.settings.test_short_side, self.settings.test_max_size)
        ]
        if categories is not None:
            check_categories("categories", categories)
        self._given_categories = categories
        self._annotations: dict[str, CocoAnnotations] = {}
        self._sources: dict[str, ImageSource] = {}
        self._faults: dict[str, ImageFaults] = {}
        self._checked: set[str] = set()

    @property
    def evaluation_arguments(self) -> dict[str, Any]:
        """The settings that evaluation depends on, as plain values; a checkpoint stores them.

        Together with ``categories`` and ``convention``, they are the arguments of a :class:`CocoDataModule` with the
        same validation and test data. ``root`` is absolute, since evaluation may run in another folder.
        """
        values = self.settings.to_dict()
        return {name: values[name] for name in DataSettings.names("inference")} | {"root": str(self.root.absolute())}

    @property
    def categories(self) -> list[dict[str, Any]]:
        """``{"id": .., "name": ..}`` by ascending id; label ``k + 1`` stands for item k.

        Raises:
            UserError: the json that defines them is missing or invalid.
        """
        if self._given_categories is not None:
            return sorted(self._given_categories, key=lambda category: category["id"])
        annotations = self.annotations(self._category_split)
        if not annotations.categories:
            raise UserError(f"{annotations.path}: 'categories' is empty, so there is nothing to detect")
        return annotations.categories

    def annotations(self, split: Split) -> CocoAnnotations:
        """The annotations of a split; its file is read at the first call.

        Raises:
            UserError: there is no such file, or it is invalid (:meth:`CocoAnnotations.load`).
        """
        if split not in self._annotations:
            path = self._path(split, "json")
            # The json that defines the categories cannot be checked against them.
            known = self._given_categories if split == self._category_split else self.categories
            folder = self.images_folder(split)
            min_box_size = self.settings.min_box_size if split == "train" else 0.0
            self._annotations[split] = CocoAnnotations.load(path, known, self.settings.on_error, folder, min_box_size)
        return self._annotations[split]

    def images_folder(self, split: Split) -> Path | None:
        """The folder of a split's images, which may be a zip file of that name; None if none is given."""
        images = getattr(self.settings, f"{split}_images")
        return None if images is None else self.root / images.removesuffix(".zip")

    def setup(self, stage: str) -> None:
        """Check that the images of all splits of a stage exist, and with ``check_images`` their headers.

        Images without a usable object are not read in training and not checked. A Trainer calls this in every process.

        Args:
            stage: Lightning's name of what follows: ``fit`` (the training and validation splits), ``validate`` or
                ``test``.

        Raises:
            UserError: a file is missing or invalid; an image is, or with ``on_error=skip``, all are.
        """
        stages: dict[str, list[Split]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}
        splits = stages.get(stage, [])
        if stage == "fit":
            # From Python, a run may do without one of the splits.
            splits = [split for split in splits if getattr(self.settings, f"{split}_json") is not None]
        for split in splits:
            if split not in self._checked:
                self._check_images(split)
                self._checked.add(split)
        if len(splits) == 2 and "overlap" not in self._checked:
            self._warn_of_overlap()
            self._checked.add("overlap")

    def _check_images(self, split: Split) -> None:
        annotations, images = self.annotations(split), self._images(split)
        rows = annotations.images_with_objects() if split == "train" else np.arange(len(annotations))
        first_rank = _is_first_rank()
        problems = check_image_files(annotations, rows, images, self.settings.check_images, progress=first_rank)
        if not problems:
            return
        described = f"{images.path}: {describe_problems(problems, len(rows))}, which {annotations.path} lists"
        if len(problems) == len(rows):
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
        train, val = self.annotations("train"), self.annotations("val")
        reason = "the validation metrics will not show how well the model generalizes"
        if train.path.resolve() == val.path.resolve():
            _log.warning("%s is used for training and for validation; %s", val.path, reason)
            return
        count, first = shared_images((train, self._images("train")), (val, self._images("val")))
        if count:
            total = counted(len(val), "validation image", "validation images")
            _log.warning("%d of %s are also training images (%s, ...); %s", count, total, first, reason)

    def _images(self, split: Split) -> ImageSource:
        # One for all loaders, because reading the directory of a large archive takes seconds.
        if split not in self._sources:
            self._sources[split] = ImageSource(self._path(split, "images"))
        return self._sources[split]

    def _faults_of(self, split: Split) -> ImageFaults:
        """The faults that all loaders of a split share, so that each is reported once."""
        if split not in self._faults:
            self._faults[split] = ImageFaults.none(len(self.annotations(split)))
        return self._faults[split]

    def train_dataloader(self) -> DataLoader:
        """Training batches from ``start_step`` to ``max_steps``, of the images with at least one usable object.

        Raises:
            UserError: a file is missing or invalid, or no image has a usable object.
        """
        annotations = self.annotations("train")
        rows = annotations.images_with_objects()
        if len(rows) == 0:
            small = f" or boxes of at most {self.settings.min_box_size:g} pixels" if self.settings.min_box_size else ""
            raise UserError(f"{annotations.path}: no image has an object to train on (crowds{small} do not count)")
        if self.max_steps is None:
            raise ArgumentError("max_steps", "=None: training needs the number of steps")
        rank, world_size = self._rank()
        per_process = self.settings.batch_orientation == "process"
        portrait = (annotations.portrait | annotations.square if per_process else annotations.portrait)[rows]
        order = TrainOrder(rows, portrait, self.seed, self.batch_size, world_size, per_process)
        sampler = TrainBatchSampler(order, rank, self.start_step, self.max_steps)
        return self._loader("train", self.train_augmentations, replacements=rows, batch_sampler=sampler)

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
        augmentations: list[Augmentation],
        replacements: np.ndarray | None = None,
        **batching: Any,
    ) -> DataLoader:
        dataset = CocoDataset(
            self.annotations(split),
            self._images(split),
            augmentations,
            self.convention,
            self.seed,
            self.settings.on_error,
            replacements,
            self._faults_of(split),
        )
        return DataLoader(
            dataset,
            num_workers=self.settings.num_workers,
            persistent_workers=self.settings.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_signals,
            collate_fn=_collate_in_worker if self.settings.num_workers else collate,
            **batching,
        )

    def _rank(self) -> tuple[int, int]:
        """The rank of this process and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def _category_split(self) -> Split:
        """The split whose json defines the categories unless they were given."""
        return "train" if self.settings.train_json else "val"

    def _path(self, split: Split, kind: Literal["json", "images"]) -> Path:
        """The existing path that a setting refers to; images may be a folder or its .zip.

        Raises:
            ArgumentError: the setting is None, or the path does not exist.
        """
        argument = f"{split}_{kind}"
        name = getattr(self.settings, argument)
        if name is None:
            raise ArgumentError(argument, f"=null: set it to use the {split} split")
        path = self.root / name
        if path.exists() or (kind == "images" and path.with_name(path.name + ".zip").exists()):
            return path
        source = _COCO_SOURCE if name in _COCO_FILES else ""
        raise ArgumentError(argument, f"={path}: no such file or folder; {self._expected_files()}{source}")

    def _expected_files(self) -> str:
        """The files that should be in ``root``, for messages."""
        names = []
        for split in ("train", "val", "test"):
            json, images = (getattr(self.settings, f"{split}_{kind}") for kind in ("json", "images"))
            if json:
                names.append(json)
            if images:
                names.append(images if images.endswith(".zip") else f"{images}/ or {images}.zip")
        return f"expected in {self.root.absolute()}: {', '.join(names)}"


def _collate_in_worker(samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> Any:
    """The batch of :func:`collate`, which the main process receives as it is."""
    return to_send(collate(samples))


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
            categories=CATEGORIES,
            **arguments,
        )

    def prepare_data(self) -> None:
        """Render the data set unless it exists.

        Raises:
            ArgumentError: ``root`` contains something else.
        """
        write_shapes(self.root, self.settings.train_count, self.settings.val_count)
