"""The data of a run: which files, how they become batches, and in which order."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cpm_rcnn.boxes import CONVENTIONS
from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.dataset import CocoDataset
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.samplers import EvalSampler, TrainBatchSampler, TrainOrder, collate
from cpm_rcnn.data.settings import DataSettings, ShapesSettings
from cpm_rcnn.data.shapes import CATEGORIES, write_shapes
from cpm_rcnn.data.transforms import Augmentation, RandomFlip, RandomResize, Resize
from cpm_rcnn.errors import ArgumentError, UserError, check_choice, check_count, check_range

Split = Literal["train", "val", "test"]


class CocoDataModule(pl.LightningDataModule):
    """A COCO-style data set on disk.

    Its loaders shard by rank themselves, so the Trainer needs ``use_distributed_sampler=False``. They yield batches of
    :class:`~cpm_rcnn.data.CocoDataset` as :func:`~cpm_rcnn.data.samplers.collate` builds them. No file is read before
    it is needed.

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
        train_augmentations: the list that is applied in training. Change it before the loader is built to add your own.
        eval_augmentations: the list that is applied in validation and test; it may only resize.
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
            RandomResize(self.settings.short_sides, self.settings.max_size),
            RandomFlip(self.settings.flip_probability, self.convention),
        ]
        self.eval_augmentations: list[Augmentation] = [
            Resize(self.settings.test_short_side, self.settings.test_max_size)
        ]
        self._given_categories = categories
        self._annotations: dict[str, CocoAnnotations] = {}

    @property
    def evaluation_arguments(self) -> dict[str, Any]:
        """The settings, as plain values, that evaluation depends on; a checkpoint stores them.

        With ``categories`` and ``convention``, they make a :class:`CocoDataModule` of the same validation and test
        data. ``root`` is absolute, since evaluation may run in another folder.
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
        return self.annotations(self._category_split).categories

    def annotations(self, split: Split) -> CocoAnnotations:
        """The annotations of a split; its file is read at the first call.

        Raises:
            UserError: there is no such file, or it is invalid (:meth:`CocoAnnotations.load`).
        """
        if split not in self._annotations:
            path = self._path(split, "json")
            # The json that defines the categories cannot be checked against them.
            known = self._given_categories if split == self._category_split else self.categories
            self._annotations[split] = CocoAnnotations.load(path, known, self.settings.on_error)
        return self._annotations[split]

    def train_dataloader(self) -> DataLoader:
        """Training batches from ``start_step`` to ``max_steps``, of the images with at least one usable object.

        Raises:
            UserError: a file is missing or invalid, or no image has a usable object.
        """
        annotations = self.annotations("train")
        rows = annotations.images_with_objects()
        if len(rows) == 0:
            raise UserError(f"{annotations.path}: no image has an object to train on (crowds do not count)")
        if self.max_steps is None:
            raise ArgumentError("max_steps", "=None: training needs the number of steps")
        rank, world_size = self._rank()
        order = TrainOrder(rows, annotations.portrait[rows], self.seed, self.batch_size, world_size)
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
            ImageSource(self._path(split, "images")),
            augmentations,
            self.convention,
            self.seed,
            self.settings.on_error,
            replacements,
        )
        return DataLoader(
            dataset,
            num_workers=self.settings.num_workers,
            persistent_workers=self.settings.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_signals,
            collate_fn=collate,
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
        """The path of a setting, which exists; images may be a folder or its .zip.

        Raises:
            ArgumentError: the setting is None or nothing is there.
        """
        argument = f"{split}_{kind}"
        name = getattr(self.settings, argument)
        if name is None:
            raise ArgumentError(argument, f"=null: set it to use the {split} split")
        path = self.root / name
        if path.exists() or (kind == "images" and path.with_name(path.name + ".zip").exists()):
            return path
        raise ArgumentError(argument, f"={path}: no such file or folder; {self._expected_files()}")

    def _expected_files(self) -> str:
        """What should be in ``root``, for messages."""
        names = []
        for split in ("train", "val", "test"):
            json, images = (getattr(self.settings, f"{split}_{kind}") for kind in ("json", "images"))
            if json:
                names.append(json)
            if images:
                names.append(images if images.endswith(".zip") else f"{images}/ or {images}.zip")
        return (
            f"expected in {self.root.absolute()}: {', '.join(names)} "
            "(COCO 2017: Train/Val images and annotations from https://cocodataset.org/#download)"
        )


def _ignore_signals(worker: int) -> None:
    """Leave signals that a terminal or a cluster sends to all processes to the main process, which saves the run."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class ShapesDataModule(CocoDataModule):
    """The built-in data set of drawn shapes, rendered into ``root`` on first use.

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
