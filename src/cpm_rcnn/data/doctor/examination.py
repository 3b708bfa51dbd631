"""All checks of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpm_rcnn.data.doctor.anchors import AnchorFit, Anchors, anchor_findings, suggested_sizes
from cpm_rcnn.data.doctor.annotation_files import annotation_findings, unreadable_annotations
from cpm_rcnn.data.doctor.checked_split import CheckedSplit
from cpm_rcnn.data.doctor.classes import class_counts, class_findings
from cpm_rcnn.data.doctor.duplicates import duplicate_findings
from cpm_rcnn.data.doctor.finding import Finding, by_importance
from cpm_rcnn.data.doctor.images import ReadImages
from cpm_rcnn.data.doctor.objects import object_findings
from cpm_rcnn.data.settings import DataSettings, Split
from cpm_rcnn.data.splits import DataSplits
from cpm_rcnn.errors import ArgumentError, UserError

_SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Examination:
    """The result of all checks.

    Attributes:
        findings: the most severe first.
        splits: per split ``name``, ``annotations``, ``images``, ``objects``, ``crowds``, ``without_objects`` (images),
            ``annotated`` (bool).
        classes: per class ``id``, ``name`` and ``objects``, from the name of a split to the number of used objects.
        anchors: ``sizes`` and, of the training objects, the shares from 0 to 1 with an IoU below 0.3
            (``low_iou``) and without a positive anchor if border anchors are ignored (``without_border_anchors``);
            ``suggested_sizes`` and ``suggested_low_iou``. None without training objects.
    """

    findings: list[Finding]
    splits: list[dict[str, Any]]
    classes: list[dict[str, Any]]
    anchors: dict[str, Any] | None


def examine(splits: DataSplits, settings: DataSettings, anchors: Anchors, progress: bool = False) -> Examination:
    """Check annotations and images of all splits.

    Args:
        splits: the data set. Invalid entries are skipped and become findings.
        settings: its settings.
        anchors: the anchors of the model.
        progress: show progress bars on standard error.

    Raises:
        ArgumentError: the settings name files of the training or the validation split that do not exist.
    """
    splits = splits.tolerant()
    checked, findings = _read_annotations(splits, settings, progress)
    findings += annotation_findings(checked) + examine_annotations(checked, anchors)
    read = []
    for split in checked:
        try:
            read.append(ReadImages.of(split, splits.images(split.name), progress))
        except ArgumentError:
            raise
        except UserError as error:
            findings.append(Finding("fault", "unreadable images", f"{error}.", len(split.annotations)))
    findings += [finding for each in read for finding in each.findings] + duplicate_findings(read)
    return Examination(by_importance(findings), *_facts(checked, anchors))


def examine_annotations(splits: Sequence[CheckedSplit], anchors: Anchors) -> list[Finding]:
    """The findings that need no images, without those of the annotation files themselves; the most severe first."""
    found = class_findings(splits) + object_findings(splits)
    for split in splits:
        if split.name == "train" and len(split.objects):
            found += anchor_findings(split, anchors)
    return by_importance(found)


def _read_annotations(
    splits: DataSplits, settings: DataSettings, progress: bool
) -> tuple[list[CheckedSplit], list[Finding]]:
    """The splits that can be read, and findings about the others."""
    checked, findings, errors = [], [], []
    for name in _SPLITS:
        if not splits.has(name):
            if name == "val":
                sentence = "There is no val split, which a training needs."
                findings.append(Finding("warning", "no val split", sentence, 1, override="val_fraction=0.2"))
            continue
        try:
            checked.append(CheckedSplit.of(name, splits.annotations(name, progress), settings))
        except ArgumentError as error:
            # The paths of COCO's test images are set by default, but training does not need them.
            if name != "test":
                raise
            findings.append(Finding("note", "no test split", f"The test split was not checked: {error}.", 1))
        except UserError as error:
            errors.append((name, str(error)))
    return checked, findings + unreadable_annotations(errors)


def _facts(
    splits: Sequence[CheckedSplit], anchors: Anchors
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any] | None]:
    """``splits``, ``classes`` and ``anchors`` of an :class:`Examination`."""
    if not splits:
        return [], [], None
    described = [
        {
            "name": split.name,
            "annotations": str(split.annotations.path),
            "images": len(split.annotations),
            "objects": len(split.objects),
            "crowds": int(split.annotations.crowds.sum()),
            "without_objects": len(split.annotations.images_without_objects()),
            "annotated": split.annotations.has_annotations,
        }
        for split in splits
    ]
    counts = {split.name: class_counts(split).tolist() for split in splits if split.annotations.has_annotations}
    classes = [
        category | {"objects": {name: each[row] for name, each in counts.items()}}
        for row, category in enumerate(splits[0].annotations.categories)
    ]
    train = next((split for split in splits if split.name == "train" and len(split.objects)), None)
    if train is None:
        return described, classes, None
    fit = AnchorFit.of(train, anchors)
    sizes, share = suggested_sizes(train, anchors)
    shares = {"low_iou": float(fit.unmatched.mean()), "without_border_anchors": float(fit.ignored.mean())}
    suggested = {"suggested_sizes": sizes, "suggested_low_iou": share}
    return described, classes, {"sizes": list(anchors.sizes), **shares, **suggested}
