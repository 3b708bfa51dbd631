"""TensorBoard and Weights & Biases get the validation sheet, the curves and the report; the real packages are used."""

import json
import logging

import numpy as np
import pytest
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from cpm_rcnn.training.logged_results import log_results
from cpm_rcnn.training.tolerant_logger import TolerantLogger

POINTS = [0.0, 0.5, 1.0]


def series(name):
    return {
        "name": name,
        "precision": {"0.50": [1.0, 0.75, 0.25]},
        "precision_at": [0.25, 0.5, float("nan")],
        "recall_at": [1.0, 0.5, 0.0],
    }


REPORT = {
    "title": "Evaluation of a test",
    "findings": [{"level": "note", "text": "RSM lowers AP.", "section": "scores"}],
    "classes": [{"name": "cat", "objects": 8}, {"name": "owl", "objects": 0}],
    "curves": {"recalls": POINTS, "thresholds": POINTS, "series": [series("mean"), series("cat"), series("owl")]},
}


@pytest.fixture
def files(tmp_path):
    """The sheet and the page of a finished run."""
    sheet, page = tmp_path / "validation.png", tmp_path / "report.html"
    Image.fromarray(np.full((6, 9, 3), (10, 200, 30), dtype=np.uint8)).save(sheet)
    page.write_text("<!doctype html><p>the report of a test</p>")
    return sheet, page


def test_tensorboard_gets_sheet_curves_and_report(tmp_path, files):
    logger = TolerantLogger(TensorBoardLogger(str(tmp_path), name="tensorboard", version=""))
    log_results([logger], REPORT, *files, step=7)

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    (image,) = events.Images("validation")
    assert (image.step, image.width, image.height) == (7, 9, 6)
    (curve,) = events.Tensors("precision-recall/cat")
    hits, false, _, missed, precision, recall = make_ndarray(curve.tensor_proto)
    assert hits.tolist() == [8, 4, 0]
    assert false.tolist() == [24, 4, 0]
    assert missed.tolist() == [0, 4, 8]
    assert precision.tolist() == [0.25, 0.5, 1]
    assert recall.tolist() == [1, 0.5, 0]
    assert "precision-recall/owl" not in events.Tags()["tensors"]
    (text,) = events.Tensors("report/text_summary")
    assert "RSM lowers AP." in make_ndarray(text.tensor_proto).item().decode()


def test_wandb_gets_sheet_curves_and_report(tmp_path, files, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=str(tmp_path), project="test", offline=True)
    logger.log_metrics({"val/AP": 0.5}, step=7)
    log_results([TolerantLogger(logger)], REPORT, *files, step=7)
    logger.experiment.finish()

    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    media = folder / "files" / "media"
    (page,) = (media / "html").glob("report_*.html")
    assert "the report of a test" in page.read_text()
    (picture,) = (media / "images").glob("validation_*.png")
    assert Image.open(picture).size == (9, 6)
    (table,) = (media / "table").rglob("precision-recall_*.json")
    rows = json.loads(table.read_text())["data"]
    assert [0.5, "cat", 0.75] in [[row[0], row[1], row[2]] for row in rows]
    assert list(folder.glob("*.wandb"))


def test_a_failing_logger_is_a_warning_and_others_get_nothing(tmp_path, files, caplog):
    failing = TensorBoardLogger(str(tmp_path / "tb"))
    failing.experiment.add_image = None
    csv = CSVLogger(str(tmp_path / "csv"))
    with caplog.at_level(logging.WARNING):
        log_results([TolerantLogger(failing), TolerantLogger(csv)], REPORT, *files, step=7)
    assert "TensorBoardLogger failed (TypeError" in caplog.text


def test_without_a_sheet_the_rest_is_logged(tmp_path, files):
    sheet, page = files
    sheet.unlink()
    logger = TolerantLogger(TensorBoardLogger(str(tmp_path), name="tensorboard", version=""))
    log_results([logger], REPORT, sheet, page, step=7)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == []
    assert "report/text_summary" in events.Tags()["tensors"]
