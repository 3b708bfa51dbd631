"""COCO: one json per split, beside folders or archives of images."""

import re
from collections.abc import Iterator
from pathlib import Path

from cpm_rcnn.data.formats.layout import (
    IMAGE_FOLDERS,
    SPLIT_NAMES,
    Layout,
    SplitFiles,
    files_in,
    shown_path,
    split_folders,
    subfolders,
)
from cpm_rcnn.data.raw import RawAnnotations
from cpm_rcnn.data.settings import Split
from cpm_rcnn.errors import UserError
from cpm_rcnn.remote.urls import Location


def split_files(json: Location, images: Location) -> SplitFiles:
    """The split of a json and the folder or archive of its images."""
    return SplitFiles(json, images, lambda progress: RawAnnotations.from_json(json))


def find(root: Path) -> Layout | None:
    """The data set in COCO's format in ``root``; None if there is none.

    Its jsons are in ``root``, in ``annotations/``, or in folders named like splits, as Roboflow writes them. Words in
    their names say which split they are of; a single json without such a word is of the training split.

    Raises:
        UserError: several jsons may be those of a split, or there is no folder for the images of one.
    """
    by_folder = {
        split: folder / names[0] for split, folder in split_folders(root).items() if len(names := _jsons(folder)) == 1
    }
    if by_folder:
        splits = {split: split_files(json, json.parent) for split, json in by_folder.items()}
        return Layout("coco", ", ".join(shown_path(json, root) for json in by_folder.values()), splits)
    folders = [folder for folder in (subfolders(root).get("annotations"), root) if folder is not None]
    jsons = next((found for folder in folders if (found := [folder / name for name in _jsons(folder)])), [])
    if not jsons:
        return None
    by_split: dict[Split, list[Path]] = {}
    for json in jsons:
        split = _split_in_name(json.stem)
        if split is not None or len(jsons) == 1:
            by_split.setdefault(split or "train", []).append(json)
    chosen = {split: _only(split, candidates) for split, candidates in by_split.items()}
    if not chosen:
        return None
    splits = {split: split_files(json, _images_of(root, split, json)) for split, json in chosen.items()}
    return Layout("coco", ", ".join(shown_path(json, root) for json in chosen.values()), splits)


def _jsons(folder: Path) -> list[str]:
    """The names of the jsons in ``folder`` that look like COCO's."""
    return [name for name in files_in(folder, [".json"]) if _lists_images(folder / name)]


def _lists_images(path: Path) -> bool:
    try:
        return b'"images"' in path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _split_in_name(stem: str) -> Split | None:
    """The split of the first word that means one, for example in ``instances_val2017``."""
    words = re.findall(r"[a-z]+", stem.lower())
    return next((split for word in words for split, names in SPLIT_NAMES.items() if word in names), None)


def _only(split: Split, jsons: list[Path]) -> Path:
    """The json of a split, of several with that split's name: COCO's ``instances_*.json`` has the boxes."""
    boxes = [json for json in jsons if json.stem.startswith("instances_")] or jsons
    if len(boxes) > 1:
        raise UserError(
            f"{boxes[0].parent}: {', '.join(json.name for json in boxes)} may all be those of the {split} split; name "
            f"one with {split}_json=FILE {split}_images=FOLDER"
        )
    return boxes[0]


def _images_of(root: Path, split: Split, json: Path) -> Path:
    """The folder or archive of the images of a json: named like the json or the split, or for the images of all."""

    def candidates() -> Iterator[Path]:
        for folder in [root, *(subfolders(root)[name] for name in IMAGE_FOLDERS if name in subfolders(root))]:
            for name in (json.stem.removeprefix("instances_"), *SPLIT_NAMES[split]):
                yield folder / name
        yield from (subfolders(root)[name] for name in IMAGE_FOLDERS if name in subfolders(root))
        if json.parent == root:
            yield root

    for candidate in candidates():
        if candidate.is_dir() or Path(f"{candidate}.zip").is_file():
            return candidate
    raise UserError(
        f"{json}: no folder of its images in {root}, for example {split}/ or images/; name both with "
        f"{split}_json=FILE {split}_images=FOLDER"
    )
