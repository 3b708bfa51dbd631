"""The data of a run: which files, how they become batches, and in which order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cpm_rcnn.data.samplers import EvalSampler, TrainBatchSampler, TrainOrder, collate
from cpm_rcnn.data.annotations import CocoAnnotations, CocoDataset, OnError
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.shapes import CATEGORIES, TRAIN_IMAGES, VAL_IMAGES, write_shapes
from cpm_rcnn.data.transforms import EvalTransform, TrainTransform
from cpm_rcnn.errors import UserError, check_choice, check_count, check_list, check_range
from cpm_rcnn.boxes import CONVENTIONS

Split = Literal["train", "val", "test"]


class CocoDataModule(pl.LightningDataModule):
    """A COCO-style data set on disk.

    Its loaders shard by rank themselves, hence the Trainer needs ``use_distributed_sampler=False``. Batches are those
    of :func:`~cpm_rcnn.data.samplers.collate` over :class:`~cpm_rcnn.data.annotations.CocoDataset`.

    Args:
        root: folder that the other paths are relative to, or None where they need none.
        train_json: annotations of the training split; None where nobody trains.
        train_images: its image folder or .zip.
        val_json: annotations of the validation split.
        val_images: its image folder or .zip.
        test_json: annotations, or image list, of a test split.
        test_images: its image folder or .zip.
        categories: what labels mean, each with ``id`` and ``name``; None takes them from ``train_json``, or from
            ``val_json`` where there is no ``train_json``.
        batch_size: training images per step and process.
        eval_batch_size: images per step and process in validation and test.
        num_workers: worker processes of each loader.
        short_sides: scales to train at, the shorter side in pixels.
        max_size: most pixels of the longer side in training.
        test_short_side: shorter side in pixels in validation and test; None leaves images at their size.
        test_max_size: most pixels of the longer side in validation and test.
        flip_probability: of a horizontal flip in training, 0 to 1.
        seed: of the order and the augmentation.
        max_steps: length of the whole run in steps, each of one batch; only training needs it.
        convention: name of the pixel convention of the targets, ``continuous`` or ``inclusive``.
        on_error: what becomes of faulty annotations and images: ``raise``, an error at the first file that has some; or
            ``skip``, a warning (:meth:`CocoAnnotations.load` and :class:`~cpm_rcnn.data.annotations.CocoDataset` say how).

    Attributes:
        start_step: first step that the training loader yields; a resumed run sets it.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        root: str | None,
        train_json: str | None,
        train_images: str | None,
        val_json: str,
        val_images: str,
        test_json: str | None = None,
        test_images: str | None = None,
        categories: Sequence[dict[str, Any]] | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        short_sides: Sequence[int] = (800,),
        max_size: int = 1333,
        test_short_side: int | None = 800,
        test_max_size: int = 1333,
        flip_probability: float = 0.5,
        seed: int = 0,
        max_steps: int | None = None,
        convention: str = "continuous",
        on_error: OnError = "raise",
    ) -> None:
        super().__init__()
        check_count("data.batch_size", batch_size)
        check_count("data.eval_batch_size", eval_batch_size)
        check_count("data.num_workers", num_workers, 0)
        check_list("data.short_sides", short_sides)
        for short_side in short_sides:
            check_count("data.short_sides", short_side)
        check_range("number of data.short_sides", len(short_sides), 1)
        check_count("data.max_size", max_size)
        if test_short_side is not None:
            check_count("data.test_short_side", test_short_side)
        check_count("data.test_max_size", test_max_size)
        check_range("data.flip_probability", flip_probability, 0, 1)
        check_range("seed", seed, 0, 2**32 - 1)
        if max_steps is not None:
            check_range("max_steps", max_steps, 1)
        check_choice("convention", convention, CONVENTIONS)
        check_choice("data.on_error", on_error, ("raise", "skip"))
        self.root = Path(root or "").expanduser()
        self._files = {
            "train": (train_json, train_images),
            "val": (val_json, val_images),
            "test": (test_json, test_images),
        }
        self._given_categories = categories
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.on_error = on_error
        self.seed = seed
        self.max_steps = max_steps
        self.start_step = 0
        self.convention = CONVENTIONS[convention]
        self._train_transform = TrainTransform(tuple(short_sides), max_size, flip_probability, seed, self.convention)
        self._eval_transform = EvalTransform(test_short_side, test_max_size)
        self._annotations: dict[str, CocoAnnotations] = {}

    @property
    def evaluation_arguments(self) -> dict[str, Any]:
        """Plain arguments that make a module of the same validation and test data: what a checkpoint stores."""
        (val_json, val_images), (test_json, test_images) = self._files["val"], self._files["test"]
        return {
            # Absolute, since eval may be called from another folder.
            "root": str(self.root.absolute()),
            "train_json": None,
            "train_images": None,
            "val_json": val_json,
            "val_images": val_images,
            "test_json": test_json,
            "test_images": test_images,
            "eval_batch_size": self.eval_batch_size,
            "num_workers": self.num_workers,
            "on_error": self.on_error,
            "test_short_side": self._eval_transform.short_side,
            "test_max_size": self._eval_transform.max_size,
        }

    @property
    def categories(self) -> list[dict[str, Any]]:
        """``{"id": .., "name": ..}`` by ascending id; label ``k + 1`` stands for item k.

        Raises:
            UserError: the json that says so is missing or faulty.
        """
        if self._given_categories is not None:
            return sorted(self._given_categories, key=lambda category: category["id"])
        return self.annotations("train" if self._files["train"][0] else "val").categories

    def annotations(self, split: Split) -> CocoAnnotations:
        """The annotations of a split, read once.

        Raises:
            UserError: no such file, or one that does not hold together (:meth:`CocoAnnotations.load`).
        """
        if split not in self._annotations:
            path = self._path(split, "json")
            # The json that names the categories is the one that they cannot be checked against.
            names_them = split == ("train" if self._files["train"][0] else "val")
            known = self._given_categories if names_them else self.categories
            self._annotations[split] = CocoAnnotations.load(path, known, self.on_error)
        return self._annotations[split]

    def train_dataloader(self) -> DataLoader:
        """Training batches from ``start_step`` to ``max_steps``, without images that hold no usable object.

        Raises:
            UserError: missing files, or no image with a usable object.
        """
        annotations = self.annotations("train")
        rows = annotations.images_with_objects()
        if len(rows) == 0:
            raise UserError(f"{annotations.path}: no image has an object to train on (crowds do not count)")
        if self.max_steps is None:
            raise UserError("max_steps=None: training needs the run's length in steps")
        rank, world_size = self._rank()
        order = TrainOrder(rows, annotations.portrait[rows], self.seed, self.batch_size, world_size)
        sampler = TrainBatchSampler(order, rank, self.start_step, self.max_steps)
        return self._loader("train", self._train_transform, rows, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        """All images of the validation split, in the json's order.

        Raises:
            UserError: missing files.
        """
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """All images of the test split, in the json's order.

        Raises:
            UserError: missing files, or no test split in the configuration.
        """
        return self._eval_loader("test")

    def _eval_loader(self, split: Split) -> DataLoader:
        sampler = EvalSampler(len(self.annotations(split)), *self._rank())
        return self._loader(split, self._eval_transform, None, sampler=sampler, batch_size=self.eval_batch_size)

    def _loader(
        self, split: Split, transform: TrainTransform | EvalTransform, stand_ins: np.ndarray | None, **batching: Any
    ) -> DataLoader:
        images = ImageSource(self._path(split, "images"))
        return DataLoader(
            CocoDataset(self.annotations(split), images, transform, self.convention, self.on_error, stand_ins),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            **batching,
        )

    def _rank(self) -> tuple[int, int]:
        """This process' rank, and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _path(self, split: Split, kind: Literal["json", "images"]) -> Path:
        """A configured path that exists, for images as folder or as .zip."""
        key = f"data.{split}_{kind}"
        name = self._files[split][kind == "images"]
        if name is None:
            raise UserError(f"{key}=null: set it to use the {split} split")
        path = self.root / name
        if path.exists() or (kind == "images" and path.with_name(path.name + ".zip").exists()):
            return path
        raise UserError(f"{key}={path}: not there; {self._expected()}")

    def _expected(self) -> str:
        """What a user should find, or put, where the configuration points."""
        names = []
        for listed, images in self._files.values():
            if listed:
                names.append(listed)
            if images:
                names.append(images if images.endswith(".zip") else f"{images}/ or {images}.zip")
        return (
            f"expected in {self.root.absolute()}: {', '.join(names)} "
            "(COCO 2017: Train/Val images and annotations from https://cocodataset.org/#download)"
        )


class ShapesDataModule(CocoDataModule):
    """The embedded data set of drawn shapes, rendered into ``root`` on first use.

    Args:
        root: folder to render into; its parents are made where needed.
        train_count: number of training images.
        val_count: number of validation images.
        **options: the remaining arguments of :class:`CocoDataModule`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self, *, root: str, train_count: int = TRAIN_IMAGES, val_count: int = VAL_IMAGES, **options: Any
    ) -> None:
        check_count("data.train_count", train_count)
        check_count("data.val_count", val_count)
        super().__init__(
            root=root,
            train_json="annotations/instances_train.json",
            train_images="train",
            val_json="annotations/instances_val.json",
            val_images="val",
            categories=CATEGORIES,
            **options,
        )
        self._counts = train_count, val_count

    def prepare_data(self) -> None:
        """Render the data set where it is not there yet.

        Raises:
            UserError: ``root`` holds something else.
        """
        write_shapes(self.root, *self._counts)
