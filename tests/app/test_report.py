"""train and eval leave a report of the evaluation that they print."""

import json

import pytest
from small_run import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = ["classification", "ISM", "RSM"]


def content_of(folder):
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org/", "")
    return json.loads((folder / "report.json").read_text()), page


def test_a_training_leaves_the_report_of_the_checkpoint_that_it_reports(trained):
    report, page = content_of(trained.folder)
    metrics = json.loads((trained.folder / "metrics.json").read_text())
    assert report["metrics"]["AP"] == metrics["AP"]
    assert [each["name"] for each in report["scores"]["stages"]] == STEPS
    assert f"{metrics['selected']} checkpoint (step {metrics[metrics['selected']]['step']})" in report["title"]
    assert ["head", "cpm, 3 stages, ISM, RSM"] in report["description"]
    for each in report["classes"]:
        assert each["name"] in page


def test_eval_leaves_the_same_report_as_the_training(command, checkpoint, trained):
    answer = command("eval", f"ckpt={checkpoint}", "trainer=cpu")
    assert answer.status == 0, answer.err
    report, _ = content_of(answer.folder)
    before, _ = content_of(trained.folder)
    own = {"title", "description"}
    assert {key: value for key, value in report.items() if key not in own} == {
        key: value for key, value in before.items() if key not in own
    }
    assert report["operating_points"] == json.loads((answer.folder / "operating_points.json").read_text())


def test_a_multi_scale_evaluation_without_a_module_has_a_report(command, checkpoint):
    options = ["multi_scale=on", "multi_scale.scales=[1.0]", "detector.ism=false", "trainer=cpu"]
    answer = command("eval", f"ckpt={checkpoint}", *options)
    assert answer.status == 0, answer.err
    report, _ = content_of(answer.folder)
    assert [each["name"] for each in report["scores"]["stages"]] == ["classification", "RSM"]


def test_a_split_without_annotations_has_no_report(command, checkpoint, workplace):
    known = json.loads((workplace / "data/shapes/annotations/instances_val.json").read_text())
    path = workplace / "only_images.json"
    path.write_text(json.dumps({key: known[key] for key in ("images", "categories")}))
    answer = command("eval", f"ckpt={checkpoint}", f"split={path}", "images=data/shapes/val", "trainer=cpu")
    assert answer.status == 0, answer.err
    assert not (answer.folder / "report.html").exists()


def test_a_run_with_tensorboard_logs_scalars_sheet_curves_and_report(command):
    answer = command("train", *SMALL, "logger=tensorboard", "name=with_tensorboard", "overwrite=true")
    assert answer.status == 0, answer.err
    events = EventAccumulator(str(answer.folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "val/AP"} <= set(tags["scalars"])
    assert tags["images"] == ["validation"]
    assert "report/text_summary" in tags["tensors"]
    assert any(tag.startswith("precision-recall/") for tag in tags["tensors"])
    metrics = json.loads((answer.folder / "metrics.json").read_text())
    (image,) = events.Images("validation")
    assert image.step == metrics[metrics["selected"]]["step"]
    # The best checkpoint is evaluated once more at the end, which is not logged.
    assert metrics["best"]["step"] < metrics["last"]["step"]
    logged = [each.value for each in events.Scalars("val/AP")]
    assert logged == pytest.approx([metrics["best"]["AP"], metrics["last"]["AP"]])
