"""What TensorBoard and Weights & Biases get at the end of a training, in addition to the scalars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from cpm_rcnn.training.tolerant_logger import TolerantLogger

# Classes with a curve of their own: more are unreadable in one place.
_MOST_CLASSES = 30


def log_results(loggers: Sequence[Logger], report: dict[str, Any], sheet: Path, page: Path, step: int) -> None:
    """Log the validation sheet, precision-recall curves and the report. Other loggers than those two get nothing.

    Args:
        loggers: the loggers of the Trainer.
        report: the content of ``report.json``.
        sheet: the picture of the validation sheet; it may be missing.
        page: ``report.html``.
        step: the training step of the evaluated weights.
    """
    for logger in loggers:
        if isinstance(logger, TolerantLogger):
            logger.attempt(_log, report, sheet, page, step)


def _log(logger: Logger, report: dict[str, Any], sheet: Path, page: Path, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger.experiment, report, sheet, page, step)
    elif isinstance(logger, WandbLogger):
        _to_wandb(logger.experiment, report, sheet, page, step)


def _to_tensorboard(writer: Any, report: dict[str, Any], sheet: Path, page: Path, step: int) -> None:
    if sheet.exists():
        writer.add_image("validation", np.asarray(Image.open(sheet).convert("RGB")), step, dataformats="HWC")
    curves = report["curves"]
    objects = {each["name"]: each["objects"] for each in report["classes"]}
    for series in curves["series"][1 : _MOST_CLASSES + 1]:
        total = objects[series["name"]]
        if not total:
            continue
        recall = np.array(series["recall_at"])
        # Above the highest score nothing is kept, and precision is undefined.
        precision = np.nan_to_num(np.array(series["precision_at"]), nan=1.0)
        hits = (recall * total).round()
        false = np.where(precision > 0, hits / np.where(precision > 0, precision, 1) - hits, 0).round()
        writer.add_pr_curve_raw(
            f"precision-recall/{series['name']}",
            *(hits, false, np.zeros_like(hits), total - hits, precision, recall),
            global_step=step,
            num_thresholds=len(recall),
        )
    # TensorBoard shows no HTML.
    findings = "".join(f"- {each['text']}\n" for each in report["findings"])
    writer.add_text("report", f"{report['title']}\n\n{findings}\nThe whole report: {page.absolute()}", step)
    writer.flush()


def _to_wandb(run: Any, report: dict[str, Any], sheet: Path, page: Path, step: int) -> None:
    import wandb

    curves = report["curves"]
    series = curves["series"][: _MOST_CLASSES + 1]
    results: dict[str, Any] = {
        "report": wandb.Html(page.read_text(encoding="utf-8"), inject=False),
        "precision-recall": wandb.plot.line_series(
            xs=curves["recalls"],
            ys=[each["precision"]["0.50"] for each in series],
            keys=[each["name"] for each in series],
            title="Precision at IoU 0.5",
            xname="recall",
        ),
    }
    if sheet.exists():
        results["validation"] = wandb.Image(str(sheet))
    run.log({**results, "trainer/global_step": step})
