"""The effect of ``final_nms_iou``, a second NMS per class after the grid stages, on a trained checkpoint.

    python benchmarks/final_nms.py CHECKPOINT --root DATA

Evaluates the validation split once for each value. ``boxes per found object`` counts the detections with a score of at
least ``--min-score`` that overlap an object of their class by IoU 0.5 or more, per object that has any; ``boxes per
object`` counts all detections with that score, per object.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.ops import box_iou

import cpm_rcnn
from cpm_rcnn.data import CocoDataModule
from cpm_rcnn.evaluation.coco_metric import CocoMetric
from cpm_rcnn.evaluation.module import EvaluationModule
from cpm_rcnn.weights.checkpoints import read_checkpoint


def evaluate(options: argparse.Namespace, final_nms_iou: float | None) -> list[str]:
    """A row of the table."""
    detector = cpm_rcnn.load(options.checkpoint, final_nms_iou=final_nms_iou)
    data: dict[str, Any] = read_checkpoint(options.checkpoint)["hyper_parameters"]["data"]
    data |= {"root": str(options.root), "num_workers": 0}
    datamodule = CocoDataModule(**data, categories=detector.categories, convention=detector.convention.name)
    module = EvaluationModule(detector)
    trainer = pl.Trainer(accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
    trainer.validate(module, datamodule=datamodule, verbose=False)
    assert isinstance(module.metric, CocoMetric)
    objects, found, boxes, on_object = count(module.metric.results(), datamodule, options.min_score)
    percent = [f"{100 * module.metrics[name]:.1f}" for name in ("AP", "AP50", "AP75")]
    label = "off" if final_nms_iou is None else f"{final_nms_iou:g}"
    return [label, *percent, f"{on_object / max(found, 1):.2f}", f"{boxes / objects:.2f}", f"{found / objects:.3f}"]


def count(results: list[dict[str, Any]], datamodule: CocoDataModule, min_score: float) -> tuple[int, int, int, int]:
    """Number of objects, objects with a detection, detections, and detections on an object."""
    annotations = datamodule.annotations("val")
    category_ids = torch.tensor([category["id"] for category in datamodule.categories])
    by_image: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        if result["score"] >= min_score:
            by_image.setdefault(result["image_id"], []).append(result)
    objects = found = boxes = on_object = 0
    for row, image_id in enumerate(annotations.image_ids.tolist()):
        of_image = slice(annotations.offsets[row], annotations.offsets[row + 1])
        labels = torch.from_numpy(annotations.labels[of_image])
        detections = by_image.get(image_id, [])
        objects += len(labels)
        boxes += len(detections)
        if not detections or not len(labels):
            continue
        boxes_of_image = torch.from_numpy(annotations.xywh[of_image]).float().tolist()
        overlap = box_iou(_xyxy([d["bbox"] for d in detections]), _xyxy(boxes_of_image))
        same = torch.tensor([d["category_id"] for d in detections])[:, None] == category_ids[labels - 1]
        hit = (overlap >= 0.5) & same
        found += int(hit.any(dim=0).sum())
        on_object += int(hit.any(dim=1).sum())
    return objects, found, boxes, on_object


def _xyxy(boxes: list[list[float]]) -> Tensor:
    corner, size = torch.tensor(boxes).split(2, dim=1)
    return torch.cat([corner, corner + size], dim=1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--values", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--min-score", type=float, default=0.3)
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    table = Table(title=f"{options.checkpoint.name} on {options.root.name}, scores of at least {options.min_score:g}")
    columns = ("final_nms_iou", "AP", "AP50", "AP75", "boxes per found object", "boxes per object", "objects found")
    for name in columns:
        table.add_column(name, justify="right")
    for value in (None, *options.values):
        row = evaluate(options, value)
        print(*row, flush=True)
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
