"""The report of an evaluation: ``report.json`` and ``report.html``."""

from pathlib import Path
from typing import Any

import numpy as np
from torchmetrics import Metric

from cpm_rcnn.data.images import ImageSource
from cpm_rcnn.evaluation.analysis.report import analyze
from cpm_rcnn.evaluation.coco_metric import CocoMetric
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.remote.urls import Location
from cpm_rcnn.reporting.report import write_report


def report_evaluation(
    metric: Metric,
    operating_points: dict[str, Any] | None,
    model: str,
    settings: ModelSettings,
    images: Location | None,
    folder: Path,
) -> dict[str, Any] | None:
    """Write the report of the last metrics that ``metric`` has computed.

    Args:
        metric: the metric of the evaluation.
        operating_points: those of the same detections.
        model: what was evaluated.
        settings: the settings of the model.
        images: the folder of the images, or the zip archive beside it; None shows no pictures.
        folder: the folder to write to.

    Returns:
        The content of ``report.json``; None, and no report is written, without annotations or with a metric that is
        not a :class:`~cpm_rcnn.evaluation.coco_metric.CocoMetric`.

    Raises:
        UserError: a file cannot be written.
    """
    split = metric.evaluated_split() if isinstance(metric, CocoMetric) else None
    if split is None or operating_points is None:
        return None
    assert isinstance(metric, CocoMetric)
    annotations = metric.annotations
    data = split.data
    description = [
        ["model", model],
        ["head", _head(settings)],
        ["backbone", settings.backbone.name],
        ["annotations", _relative(annotations.path)],
        ["images", f"{data.images}"],
        ["objects", f"{(~data.object_crowds).sum()}"],
        ["detections", f"{len(data.found_scores)}"],
    ]
    report = {
        "title": f"Evaluation of {model}",
        "description": description,
        **analyze(split, operating_points),
    }
    source = None if images is None else ImageSource(images)

    def open_image(file_name: str) -> np.ndarray:
        assert source is not None
        return source.read(file_name).permute(1, 2, 0).numpy()

    write_report(report, folder, None if source is None else open_image)
    return report


def _head(settings: ModelSettings) -> str:
    """The head and its modules in words."""
    head = settings.head
    stages = getattr(head, "stages", ())
    parts = [settings.trunk.head]
    if stages:
        parts.append(f"{len(stages)} stage{'s' if len(stages) > 1 else ''}")
    parts += [name.upper() for name in ("ism", "rsm") if getattr(head, name, False)]
    return ", ".join(parts)


def _relative(path: Location) -> str:
    """The path from the working directory, if it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here) if isinstance(path, Path) and path.is_relative_to(here) else path)
