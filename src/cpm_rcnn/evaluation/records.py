"""What an evaluation was run on: written by ``eval``, and read to compare evaluations."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpm_rcnn.data.annotations import CocoAnnotations
from cpm_rcnn.errors import UserError
from cpm_rcnn.evaluation.coco_metric import CocoMetric, evaluation_data
from cpm_rcnn.evaluation.engines import EvaluationData
from cpm_rcnn.evaluation.found import FoundDetections
from cpm_rcnn.remote.urls import Location, location

RECORD = "evaluated.json"
DETECTIONS = "detections.json"
ANNOTATIONS = "annotations.json"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An evaluation that is to be compared with others.

    Attributes:
        source: what the user gave, a folder of ``eval`` or a file of detections.
        detections: the file of detections in COCO's results format.
        annotations: the annotation file.
        sha256: of the annotation file when the detections were evaluated.
        folder: the folder of the images; None if it is not known.
        image_ids: (I,) int64, the evaluated images in ascending order; None for all images of the annotation file.
        categories: the evaluated categories with ``id`` and ``name``; None for those of the annotation file.
    """

    source: Path
    detections: Path
    annotations: Path
    sha256: str
    folder: Location | None = None
    image_ids: np.ndarray | None = None
    categories: list[dict[str, Any]] | None = None


def record_evaluation(metric: CocoMetric, folder: Path, images: Location | None = None) -> None:
    """Write ``evaluated.json`` for the last metrics that ``metric`` has computed.

    Annotations that are not in one COCO-style json are written to ``annotations.json`` beside it.

    Args:
        metric: the metric.
        folder: the folder to write to.
        images: the folder of the images.
    """
    annotations = metric.annotations
    if annotations.is_json:
        path = Path(annotations.path).absolute()  # type: ignore[arg-type]
    else:
        path = folder / ANNOTATIONS
        path.write_text(json.dumps(annotations.to_coco()))
    image_ids = metric.evaluated_images().tolist()
    record = {
        # From the folder, which may be moved.
        "annotations": str(path) if annotations.is_json else ANNOTATIONS,
        "sha256": _sha256(path),
        "images_folder": None if images is None else str(images.absolute()),
        "images": len(image_ids),
        "image_ids": image_ids,
        "categories": metric.evaluated_categories(),
    }
    (folder / RECORD).write_text(json.dumps(record))


def read_evaluation(source: Path, annotations: Path | None = None) -> Evaluation:
    """The evaluation in a folder of ``eval``, or of a file of detections.

    Args:
        source: the folder or file.
        annotations: the annotation file; None for the one that the folder names.

    Raises:
        UserError: a file is missing or invalid, or the annotation file is unknown.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder or file")
    detections = source / DETECTIONS if source.is_dir() else source
    if not detections.is_file():
        raise UserError(f"{source}: is not a folder of eval, because it has no {DETECTIONS}")
    record = source / RECORD
    if not record.is_file():
        if annotations is None:
            reason = f"has no {RECORD}" if source.is_dir() else "a file of detections does not name its annotations"
            raise UserError(f"{source}: {reason}; give the annotation file with annotations=FILE")
        return Evaluation(source, detections, annotations, _sha256(annotations))
    content = _read(record)
    try:
        found = Evaluation(
            source,
            detections,
            annotations or source / content["annotations"],
            str(content["sha256"]),
            None if content["images_folder"] is None else location(content["images_folder"]),
            np.unique(np.array(content["image_ids"], dtype=np.int64)),
            [{"id": int(category["id"]), "name": str(category["name"])} for category in content["categories"]],
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{record}: not a record of eval; evaluate again") from None
    return found


def check_comparable(evaluations: Sequence[Evaluation]) -> CocoAnnotations:
    """The annotations of evaluations on the same images.

    Raises:
        UserError: they were evaluated with different annotation files, images or classes, or the annotation file is
            missing, has changed since, or has no annotations.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        both = f"{first.source} and {other.source}"
        if first.sha256 != other.sha256:
            files = f"{first.annotations} and {other.annotations}"
            if first.annotations == other.annotations:
                files = f"{first.annotations} has changed in between"
            raise UserError(f"{both}: were evaluated with different annotation files: {files}")
    path = first.annotations
    if not path.is_file():
        raise UserError(f"{first.source}: its annotation file {path} does not exist; give it with annotations=FILE")
    if _sha256(path) != first.sha256:
        raise UserError(f"{first.source}: was evaluated with another content of {path}; evaluate again")
    known = next((each.categories for each in evaluations if each.categories is not None), None)
    folder = next((each.folder for each in evaluations if each.folder is not None), None)
    # What is invalid was refused or skipped by the evaluation.
    annotations = CocoAnnotations.load(path, known, on_error="skip", folder=folder)
    if not annotations.has_annotations:
        raise UserError(f"{path}: only lists images, so that there are no metrics to compare")
    for other in evaluations[1:]:
        both = f"{first.source} and {other.source}"
        one, two = (_image_ids(each, annotations) for each in (first, other))
        if not np.array_equal(one, two):
            common = len(np.intersect1d(one, two))
            raise UserError(f"{both}: were evaluated on different images ({len(one)} and {len(two)}, {common} in both)")
        names = [_names(each, annotations) for each in (first, other)]
        if names[0] != names[1]:
            raise UserError(f"{both}: were evaluated on different classes ({len(names[0])} and {len(names[1])})")
    if missing := np.setdiff1d(_image_ids(first, annotations), annotations.image_ids).tolist():
        raise UserError(f"{first.source}: was evaluated on image {missing[0]}, which {path} does not contain")
    return annotations


def class_names(evaluation: Evaluation, annotations: CocoAnnotations) -> list[str]:
    """The names of the evaluated classes by ascending id; several of one name are followed by their ids."""
    pairs = _names(evaluation, annotations)
    names = [name for _, name in pairs]
    return [name if names.count(name) == 1 else f"{name} ({key})" for key, name in pairs]


def read_detections(evaluation: Evaluation, annotations: CocoAnnotations) -> EvaluationData:
    """The detections of an evaluation, and the objects of its images.

    Raises:
        UserError: the file of detections is invalid, or has another image.
    """
    path = evaluation.detections
    rows = _read(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: is not a list of detections in COCO's results format")
    try:
        image_ids, category_ids = (
            np.array([row[key] for row in rows], dtype=np.int64) for key in ("image_id", "category_id")
        )
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(len(rows), 4)
        scores = np.array([row["score"] for row in rows], dtype=np.float64).reshape(len(rows))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path}: is not a list of detections in COCO's results format") from None
    if not np.isfinite(boxes).all():
        raise UserError(f"{path}: has a bbox that is not finite")
    evaluated = _image_ids(evaluation, annotations)
    foreign = image_ids[~np.isin(image_ids, evaluated)]
    if len(foreign):
        raise UserError(f"{path}: has detections of image {foreign[0]}, which was not evaluated")
    keys = np.array([key for key, _ in _names(evaluation, annotations)], dtype=np.int64)
    kept = np.isin(category_ids, keys)
    found = FoundDetections(evaluated, image_ids[kept], category_ids[kept], boxes[kept], scores[kept])
    return evaluation_data(annotations, found, keys)


def _image_ids(evaluation: Evaluation, annotations: CocoAnnotations) -> np.ndarray:
    return np.sort(annotations.image_ids) if evaluation.image_ids is None else evaluation.image_ids


def _names(evaluation: Evaluation, annotations: CocoAnnotations) -> list[tuple[int, str]]:
    """Id and name of the evaluated categories by ascending id."""
    if evaluation.categories is not None:
        return sorted((category["id"], category["name"]) for category in evaluation.categories)
    pairs = zip(annotations.category_ids, annotations.category_names, annotations.listed)
    return [(key, name) for key, name, listed in pairs if listed]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
