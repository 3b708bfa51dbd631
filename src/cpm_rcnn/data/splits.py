"""The splits of a data set: from settings to checked annotations and images, whatever the format of the files."""

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.data.classes import ClassSelection
from cpm_rcnn.data.formats import find_layout
from cpm_rcnn.data.formats.coco import split_files
from cpm_rcnn.data.formats.layout import Layout, SplitFiles
from cpm_rcnn.data.holdout import hold_out
from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.data.raw import RawAnnotations
from cpm_rcnn.data.settings import DataSettings, Split
from cpm_rcnn.data.validation import check_categories
from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.remote.urls import Location, Url, join, location

_log = logging.getLogger(__name__)

# COCO's own names, and where its files are.
_COCO_FILES = {
    *(f"annotations/{name}.json" for name in ("instances_train2017", "instances_val2017", "image_info_test-dev2017")),
    *("train2017", "val2017", "test2017"),
}
_COCO_SOURCE = " (COCO 2017: Train/Val images and annotations from https://cocodataset.org/#download)"


class DataSplits:
    """The splits that :class:`~cpm_rcnn.data.settings.DataSettings` describe.

    No file is read before it is needed, and each is read once.

    Args:
        settings: the settings.
        categories: the categories of the labels, each with ``id`` and ``name``. None takes ``settings.classes``, or
            else the categories of the training split, or of the validation split if there is no other.
        warn: receives one line about each annotation file in which entries were skipped or are unusual.

    Attributes:
        root: ``settings.root`` as a URL, or as a path with ``~`` expanded.

    Raises:
        ArgumentError: ``categories`` are invalid, or lack one of ``settings.classes``.
    """

    def __init__(
        self,
        settings: DataSettings,
        categories: Sequence[dict[str, Any]] | None = None,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        if categories is not None:
            check_categories("categories", categories)
        self.root = location(settings.root or "")
        self._settings = settings
        self._classes = None if settings.classes is None else ClassSelection.from_setting(settings.classes)
        self._given_categories = categories
        self._warn = warn
        if categories is not None and self._classes is not None:
            names = [category["name"] for category in categories]
            if unknown := [name for name in self._classes.names if name not in names]:
                raise ArgumentError("classes", f": {unknown[0]} is not a class of the model; it has {_first(names)}")
        self._layout: Layout | None = None
        self._annotations: dict[Split, CocoAnnotations] = {}
        self._sources: dict[Split, ImageSource] = {}

    @property
    def categories(self) -> list[dict[str, Any]]:
        """``{"id": .., "name": ..}`` by ascending id; label ``k + 1`` stands for item k.

        Raises:
            UserError: the annotations that define them are missing or invalid.
        """
        if self._given_categories is not None:
            return sorted(self._given_categories, key=lambda category: category["id"])
        if self._classes is not None:
            return self._classes.categories
        annotations = self.annotations(self._category_split)
        if not annotations.categories:
            raise UserError(f"{annotations.path}: 'categories' is empty, so there is nothing to detect")
        return annotations.categories

    def tolerant(self) -> "DataSplits":
        """The same splits, in which invalid entries are skipped without an error or a message.

        ``faults`` and ``notes`` of the annotations tell what would have been an error or a message.
        """
        return DataSplits(replace(self._settings, on_error="skip"), self._given_categories, warn=lambda message: None)

    def has(self, split: Split) -> bool:
        """Whether there is such a split.

        Raises:
            UserError: the folder that contains the splits is missing, or a file that describes them is invalid.
        """
        return self._is_named(self._origin(split)) or self._origin(split) in self._found

    def annotations(self, split: Split, progress: bool = False) -> CocoAnnotations:
        """The annotations of a split; its files are read at the first call.

        Args:
            split: the split.
            progress: show a progress bar if images must be read for it.

        Raises:
            UserError: there is no such split, or a file is missing or invalid.
        """
        if split not in self._annotations:
            if self._settings.val_fraction is not None and split != "test":
                self._hold_out(progress)
            else:
                self._annotations[split] = self._read(split, self._min_box_size(split), progress)
        return self._annotations[split]

    def images(self, split: Split) -> ImageSource:
        """The images of a split.

        Raises:
            UserError: there is no such split, or no such folder or archive.
        """
        # One for all loaders, because reading the directory of a large archive takes seconds.
        origin = self._origin(split)
        if origin not in self._sources:
            path = self._existing(origin, "images") if self._is_named(origin) else self._files(origin).images
            self._sources[origin] = ImageSource(path)
        return self._sources[origin]

    def images_folder(self, split: Split) -> Location | None:
        """The folder of a split's images, which may be a zip file of that name; None if none is given."""
        origin = self._origin(split)
        if self._is_named(origin):
            images = getattr(self._settings, f"{origin}_images")
            if images is None:
                return None
            path = join(self.root, images)
            return path if isinstance(path, Url) else path.with_name(path.name.removesuffix(".zip"))
        return self._found[origin].images if origin in self._found else None

    def _origin(self, split: Split) -> Split:
        """The split whose files contain a split: validation images that were held out are training images there."""
        return "train" if split == "val" and self._settings.val_fraction is not None else split

    def _is_named(self, split: Split) -> bool:
        return getattr(self._settings, f"{split}_json") is not None

    @property
    def _found(self) -> Mapping[Split, SplitFiles]:
        """The splits in ``root``; none if the settings name the files of the splits."""
        if self._settings.root is None or self._is_named("train") or self._is_named("val"):
            return {}
        if self._layout is None:
            self._layout = find_layout(self.root, self._settings.format)
        return self._layout.splits

    def _files(self, split: Split) -> SplitFiles:
        """The files of a split.

        Raises:
            UserError: there is no such split, or its files do not exist.
        """
        if self._is_named(split):
            return split_files(self._existing(split, "json"), self.images_folder(split) or self.root)
        if split in self._found:
            files = self._found[split]
            if files.absent is not None:
                raise UserError(files.absent)
            return files
        instead = " or hold out a part of the training images with val_fraction=0.2" if split == "val" else ""
        if self._layout is None:
            root = "" if self._settings.root else ", or root=FOLDER for data in a format with a usual layout"
            raise ArgumentError(f"{split}_json", f"=null: set it to use the {split} split{instead}{root}")
        raise ArgumentError(
            "root",
            f"={self.root}: has no {split} split in {self._layout.format} format ({self._layout.evidence}); "
            f"add one{instead}",
        )

    def _read(self, split: Split, min_box_size: float, progress: bool) -> CocoAnnotations:
        files = self._files(split)
        raw = files.read(progress)
        known = self._given_categories
        if known is None and self._classes is not None:
            known = self._classes.categories
            if split == self._category_split:
                self._check_classes(raw)
        elif known is None and split != self._category_split:
            # The annotations that define the categories cannot be checked against them.
            known = self.categories
        return CocoAnnotations.check(
            raw, known, self._settings.on_error, files.images, min_box_size, self._classes, self._warn
        )

    def _check_classes(self, raw: RawAnnotations) -> None:
        """Raise :class:`ArgumentError` if a selected class is not among those of ``raw``."""
        assert self._classes is not None
        entries = raw.content.get("categories", [])
        names = [str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry]
        absent = self._classes.absent(names)
        if absent:
            # The old name of a renamed class is after its new one.
            first = [old for old, new in self._classes.new_names.items() if new == absent[0]][-1]
            close = difflib.get_close_matches(first, names, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ArgumentError("classes", f": {raw.path} has no class {first}{hint}; it has {_first(names) or 'none'}")

    def _hold_out(self, progress: bool) -> None:
        """Divide the training images into both splits.

        Raises:
            UserError: there is a validation split already, or the images cannot be divided.
        """
        settings = self._settings
        assert settings.val_fraction is not None
        if not self._is_named("train") and (val := self._found.get("val")) is not None and val.absent is None:
            assert self._layout is not None
            raise ArgumentError(
                "val_fraction",
                f"={settings.val_fraction}: {self.root} has a validation split already ({self._layout.evidence})",
            )
        whole = self._read("train", 0.0, progress)
        held_out = hold_out(
            whole, self.images("train"), settings.val_fraction, settings.split_seed, settings.on_error, progress
        )
        self._annotations["train"] = whole.select(np.flatnonzero(~held_out), self._min_box_size("train"))
        self._annotations["val"] = whole.select(np.flatnonzero(held_out))

    def _min_box_size(self, split: Split) -> float:
        return self._settings.min_box_size if split == "train" else 0.0

    @property
    def _category_split(self) -> Split:
        """The split whose annotations define the categories unless they were given."""
        return "train" if self.has("train") else "val"

    def _existing(self, split: Split, kind: Literal["json", "images"]) -> Location:
        """The existing path or the URL that a setting refers to; images may be a folder or its .zip.

        Raises:
            ArgumentError: the setting is None, or the path does not exist.
        """
        argument = f"{split}_{kind}"
        name = getattr(self._settings, argument)
        if name is None:
            raise ArgumentError(argument, f"=null: set it to use the {split} split")
        path = join(self.root, name)
        if isinstance(path, Url) or path.exists() or (kind == "images" and path.with_name(path.name + ".zip").exists()):
            return path
        source = _COCO_SOURCE if name in _COCO_FILES else ""
        raise ArgumentError(argument, f"={path}: no such file or folder; {self._expected_files()}{source}")

    def _expected_files(self) -> str:
        """The files that should be in ``root``, for messages."""
        names = []
        for split in ("train", "val", "test"):
            json, images = (getattr(self._settings, f"{split}_{kind}") for kind in ("json", "images"))
            if json:
                names.append(json)
            if images:
                names.append(images if images.endswith(".zip") else f"{images}/ or {images}.zip")
        return f"expected in {self.root.absolute()}: {', '.join(names)}"


def _first(names: Sequence[str]) -> str:
    """The first names, for messages."""
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20)
