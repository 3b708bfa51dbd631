"""The commands, run on a small data set: what they write and print, and how they refuse wrong input."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from runs import last_checkpoint, metrics, refused, rows_of
from small_run import SMALL

from cpm_rcnn import load
from cpm_rcnn.evaluation.coco_metric import METRIC_NAMES
from cpm_rcnn.inference import Detector

KEYS = {*METRIC_NAMES, "per_class"}


def test_train_writes_config_checkpoints_metrics_and_pictures(trained):
    folder = trained.folder
    assert OmegaConf.load(folder / "config.yaml").schedule.max_steps == 4
    assert set(metrics(folder)) == KEYS | {"selected", "best", "last", "minutes"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = (folder / "metrics.csv").read_text().splitlines()
    for column in (
        "train/loss",
        "train/loss_grid2",
        "train/loss_ism",
        "train/loss_rsm",
        "train/images_per_s",
        "val/AP",
    ):
        assert column in rows[0].split(",")
    for picture in ("loss.png", "ap.png", "validation.png"):
        assert min(Image.open(folder / picture).size) > 100


def test_eval_of_the_best_checkpoint_gives_the_final_metrics_of_training(command, trained, checkpoint):
    answer = command("eval", f"ckpt={checkpoint}", "trainer=cpu")
    assert answer.status == 0, answer.err
    assert metrics(answer.folder) == {name: metrics(trained.folder)[name] for name in KEYS}


def test_detections_json_has_the_same_metrics_in_pycocotools(command, checkpoint, workplace):
    answer = command("eval", f"ckpt={checkpoint}", "trainer=cpu", "detector.score_threshold=0.01")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(workplace / "data/shapes/annotations/instances_val.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(answer.folder / "detections.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = metrics(answer.folder)
    np.testing.assert_allclose([ours[name] for name in METRIC_NAMES], evaluation.stats, atol=1e-12)


def test_eval_takes_the_user_s_own_json(command, checkpoint, workplace):
    content = json.loads((workplace / "data/shapes/annotations/instances_val.json").read_text())
    kept = content["images"][:2]
    ids = {image["id"] for image in kept}
    content |= {"images": kept, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}
    own = workplace / "own.json"
    own.write_text(json.dumps(content))
    answer = command("eval", f"ckpt={checkpoint}", "trainer=cpu", f"split={own}", "images=data/shapes/val")
    assert answer.status == 0, answer.err
    assert set(metrics(answer.folder)) == KEYS
    assert {d["image_id"] for d in json.loads((answer.folder / "detections.json").read_text())} <= ids


def test_a_split_without_annotations_gives_detections_and_null_metrics(command, checkpoint, workplace):
    content = json.loads((workplace / "data/shapes/annotations/instances_val.json").read_text())
    del content["annotations"]
    own = workplace / "image_info.json"
    own.write_text(json.dumps(content))
    answer = command("eval", f"ckpt={checkpoint}", "trainer=cpu", f"split={own}", "images=data/shapes/val")
    assert answer.status == 0, answer.err
    assert metrics(answer.folder)["AP"] is None
    assert isinstance(json.loads((answer.folder / "detections.json").read_text()), list)


def test_multi_scale_eval_uses_the_given_scales(command, checkpoint):
    answer = command(
        "eval",
        f"ckpt={checkpoint}",
        "trainer=cpu",
        "multi_scale=on",
        "multi_scale.scales=[0.5,0.75]",
        "multi_scale.max_size=1.5",
    )
    assert answer.status == 0, answer.err
    assert set(metrics(answer.folder)) == KEYS


def test_eval_on_two_processes_equals_eval_on_one(command, checkpoint, workplace):
    # One image per batch, so that padding does not depend on the distribution of the images; one thread per process,
    # so that sums have the same order.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = command(
        "eval", f"ckpt={checkpoint}", "trainer=cpu", "detector.score_threshold=0.01", "data.eval_batch_size=1"
    )
    torch.set_num_threads(threads)
    two = subprocess.run(
        [
            *(sys.executable, "-m", "cpm_rcnn.eval", f"ckpt={checkpoint}", "trainer=cpu", "trainer.devices=2"),
            *("detector.score_threshold=0.01", "data.eval_batch_size=1", "name=two_processes"),
        ],
        cwd=workplace,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert two.returncode == 0, two.stderr
    folder = Path(two.stdout.strip().splitlines()[-1])
    assert metrics(folder) == metrics(one.folder)
    key = lambda detection: (detection["image_id"], -detection["score"], detection["bbox"])  # noqa: E731
    own, other = (sorted(json.loads((f / "detections.json").read_text()), key=key) for f in (one.folder, folder))
    assert own == other


@pytest.mark.parametrize("experiment", ["quickstart", "[quickstart,shared/release]"])
def test_training_on_two_processes_writes_one_run_folder(workplace, trained, experiment):
    small = [f"experiment={experiment}", *SMALL[1:]]
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "cpm_rcnn.train", *small, "trainer.devices=2", "trainer.strategy=ddp"),
            *("schedule.max_steps=2", "schedule.images_per_device=1", "name=two_trainers"),
        ],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    folder = workplace / "outputs/two_trainers"
    assert ran.stdout.strip().splitlines()[-1] == str(folder)
    assert set(metrics(folder)) == KEYS | {"selected", "best", "last", "minutes"}
    assert metrics(folder)["selected"] == ("last" if "release" in experiment else "best")
    assert (folder / "checkpoints/last.ckpt").is_file()


def test_predict_draws_every_image_of_a_folder(command, checkpoint, workplace):
    source = workplace / "photos"
    (source / "deep").mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(["a.jpg", "deep/b.png"]):
        Image.fromarray(np.full((60 + 40 * i, 90, 3), 99, np.uint8)).save(source / name)
    answer = command("predict", f"ckpt={checkpoint}", f"source={source}", "device=cpu", "detector.score_threshold=0.01")
    assert answer.status == 0, answer.err
    drawn = sorted(str(p.relative_to(answer.folder / "images")) for p in (answer.folder / "images").rglob("*.png"))
    assert drawn == ["a.jpg.png", "deep/b.png.png"]
    found = json.loads((answer.folder / "detections.json").read_text())
    assert {d["file_name"] for d in found} <= {"a.jpg", "deep/b.png"}
    assert all(set(d) == {"image_id", "file_name", "category_id", "bbox", "score"} for d in found)


def test_predict_skips_images_that_cannot_be_read_and_writes_the_rest(command, checkpoint, workplace):
    source = workplace / "partly_broken"
    source.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.fromarray(np.full((60, 90, 3), 99, np.uint8)).save(source / name)
    (source / "b.jpg").write_bytes(b"text")
    answer = command("predict", f"ckpt={checkpoint}", f"source={source}", "device=cpu", "detector.score_threshold=0.01")
    assert answer.status == 1
    assert (answer.out + answer.err).count("b.jpg is damaged or not an image") == 1
    assert answer.err.splitlines()[-1] == "error: 1 of 3 files could not be read completely, see above"
    assert sorted(path.name for path in (answer.folder / "images").iterdir()) == ["a.jpg.png", "c.jpg.png"]
    found = json.loads((answer.folder / "detections.json").read_text())
    assert {d["file_name"]: d["image_id"] for d in found} == {"a.jpg": 1, "c.jpg": 3}
    assert "2 images, " in answer.out


def test_eval_and_predict_say_on_request_how_each_score_was_computed(command, checkpoint):
    options = [f"ckpt={checkpoint}", "details=true", "detector.score_threshold=0.01"]
    evaluated = command("eval", *options, "trainer=cpu")
    predicted = command("predict", *options, "source=data/shapes/val", "device=cpu", "detector.rsm=false")
    for answer, rsm in ((evaluated, True), (predicted, False)):
        assert answer.status == 0, answer.err
        found = json.loads((answer.folder / "detections.json").read_text())
        assert len(found) > 3
        for row in found:
            score = row["class_score"] * row["predicted_iou"]
            if rsm:
                score = score**0.8 * row["rsm_probability"] ** 0.2
            assert row["score"] == pytest.approx(score, rel=1e-5, abs=1e-9)
            assert ("rsm_probability" in row) == rsm
    plain = command("eval", *options, "details=false", "trainer=cpu")
    keys = {"image_id", "category_id", "bbox", "score"}
    assert [set(row) for row in json.loads((plain.folder / "detections.json").read_text())] == [keys] * len(found)
    assert "details=1: must be true or false" in refused(command("eval", *options, "details=1"))


def test_predict_writes_each_kind_of_output_for_the_images_of_a_pattern(command, checkpoint, workplace):
    kinds = "[csv,yolo,crops,coco]"
    options = [
        f"ckpt={checkpoint}",
        "device=cpu",
        "detector.score_threshold=0.01",
        f"output={kinds}",
        "min_score=0.018",
    ]
    answer = command("predict", *options, "source=data/shapes/val/00000?.jpg", "batch_size=2")
    assert answer.status == 0, answer.err
    assert re.search(r"5 images, \d+ detections; milliseconds per image: read [\d.]+, detect [\d.]+, write", answer.out)
    assert not (answer.folder / "images").exists()
    found = json.loads((answer.folder / "detections.json").read_text())
    shown = [row for row in found if row["score"] >= 0.018]
    assert 0 < len(shown) < len(found)
    with (answer.folder / "detections.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["score"]) for row in table] == pytest.approx([row["score"] for row in shown], rel=1e-5)
    names = (answer.folder / "classes.txt").read_text().split()
    for number in range(1, 6):
        name = f"00000{number}.jpg"
        lines = (answer.folder / "labels" / f"00000{number}.txt").read_text().splitlines()
        own = [row for row in shown if row["file_name"] == name]
        assert len(lines) == len(own)
        size = Image.open(workplace / "data/shapes/val" / name).size
        for line, row, cells in zip(lines, own, (cells for cells in table if cells["file_name"] == name)):
            label, x, y, width, height, _ = line.split()
            assert names[int(label)] == cells["class"]
            corner = [(float(x) - float(width) / 2) * size[0], (float(y) - float(height) / 2) * size[1]]
            assert corner == pytest.approx(row["bbox"][:2], abs=1e-3)
    crops = list((answer.folder / "crops").rglob("*.png"))
    assert len(crops) == len(shown)
    assert {crop.parent.name for crop in crops} == {cells["class"] for cells in table}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["output=picture"], "output=picture: must be one of pictures, coco, csv, yolo, crops"),
        (["output=[]"], "output=[]"),
        (["batch_size=0"], "batch_size=0: must be an integer, at least 1"),
        (["source=data/shapes/val/*.gif"], "source=data/shapes/val/*.gif: matches no image"),
    ],
)
def test_predict_refuses_wrong_outputs_batches_and_patterns(command, checkpoint, arguments, line):
    arguments = [f"ckpt={checkpoint}", "device=cpu", "source=data/shapes/val", *arguments]
    assert line in refused(command("predict", *arguments))


def test_predict_counts_one_image_as_one_image(command, checkpoint):
    answer = command("predict", f"ckpt={checkpoint}", "source=data/shapes/val/000001.jpg", "device=cpu")
    assert answer.status == 0, answer.err
    assert "1 image, " in answer.out


def test_predict_and_eval_find_the_same_boxes(command, checkpoint, workplace):
    # One image per batch, as in predict: the padding of an image depends on the others in its batch.
    evaluated = command(
        "eval", f"ckpt={checkpoint}", "trainer=cpu", "detector.score_threshold=0.01", "data.eval_batch_size=1"
    )
    predicted = command(
        "predict", f"ckpt={checkpoint}", "source=data/shapes/val", "device=cpu", "detector.score_threshold=0.01"
    )
    content = json.loads((workplace / "data/shapes/annotations/instances_val.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    one = sorted(
        (names[d["image_id"]], *np.round(d["bbox"], 3))
        for d in json.loads((evaluated.folder / "detections.json").read_text())
    )
    two = sorted(
        (d["file_name"], *np.round(d["bbox"], 3))
        for d in json.loads((predicted.folder / "detections.json").read_text())
    )
    assert one
    assert one == two


def test_eval_and_predict_can_use_bfloat16(command, checkpoint, monkeypatch):
    dtypes = []
    optimize = Detector.optimize
    monkeypatch.setattr(Detector, "optimize", lambda self, dtype: dtypes.append(dtype) or optimize(self, dtype))
    for precision in ("32", "bf16"):
        for name, arguments in (("eval", ["trainer=cpu"]), ("predict", ["source=data/shapes/val", "device=cpu"])):
            answer = command(name, f"ckpt={checkpoint}", f"precision={precision}", *arguments)
            assert answer.status == 0, answer.err
            assert (answer.folder / "detections.json").exists()
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


def test_precision_is_the_only_option_for_the_precision_of_an_evaluation(command, checkpoint):
    refusal = refused(command("eval", f"ckpt={checkpoint}", "trainer=cpu", "trainer.precision=bf16-mixed"))
    assert refusal == "error: trainer.precision=bf16-mixed: only in train; eval has precision=bf16"
    for name, arguments in (("eval", ["trainer=cpu"]), ("predict", ["source=data/shapes/val"])):
        for value in ("16", "bf16-mixed", "null"):
            refusal = refused(command(name, f"ckpt={checkpoint}", f"precision={value}", *arguments))
            assert refusal == f"error: precision={value}: must be one of 32, bf16"


def test_multirun_trains_each_combination_in_its_own_process_and_ends_with_one_table(command, workplace):
    answer = command("train", "-m", *SMALL, "schedule.max_steps=1", "sheet_images=0", "ism=off", "rsm=on,off")
    assert answer.status == 0, answer.err
    folders = sorted(path.parent for path in (workplace / "outputs").glob("multirun_*/*/metrics.json"))
    assert [folder.name for folder in folders] == ["0_cpm_cmm-on_ism-off_rsm-on", "1_cpm_cmm-on_ism-off_rsm-off"]
    assert [load(folder / "checkpoints/last.ckpt").model.head.rsm is None for folder in folders] == [False, True]
    (sweep,) = (workplace / "outputs").glob("multirun_*")
    assert answer.folder == sweep
    table = rows_of(sweep, "sweep.csv")
    assert [(row["cmm"], row["ism"], row["rsm"], row["status"]) for row in table] == [
        ("on", "off", "on", "finished"),
        ("on", "off", "off", "finished"),
    ]
    assert [float(row["minutes"]) for row in table] == pytest.approx([metrics(f)["minutes"] for f in folders], rel=1e-4)
    for word in ("CMM", "ISM", "RSM", "AP75", "minutes"):
        assert word in answer.out


def test_the_last_step_is_evaluated_and_saved_as_last_ckpt_even_if_the_best_is_older(command):
    answer = command("train", *SMALL, "schedule.max_steps=3", "name=odd_length", "sheet_images=0")
    assert answer.status == 0, answer.err
    last = last_checkpoint(answer.folder)
    assert last["global_step"] == 3
    evaluated = [row["step"] for row in rows_of(answer.folder) if row["val/AP"]]
    assert evaluated[:2] == ["1", "2"]


def test_a_run_resumes_at_the_step_of_its_checkpoint(command, trained):
    last = trained.folder / "checkpoints/last.ckpt"
    answer = command("train", *SMALL, "schedule.max_steps=6", f"resume={last}", "name=resumed", "sheet_images=0")
    assert answer.status == 0, answer.err
    assert last_checkpoint(answer.folder)["global_step"] == 6
    assert [row["step"] for row in rows_of(answer.folder) if row["train/loss"]] == ["4", "5"]
    seconds = torch.load(last, weights_only=True)["callbacks"]["Timer"]["time_elapsed"]["train"]
    assert metrics(answer.folder)["minutes"] > seconds / 60 > 0


def test_a_checkpoint_stores_its_model_classes_and_convention(checkpoint):
    detector = load(checkpoint)
    assert detector.class_names == ["circle", "square", "triangle", "star", "cross"]
    assert detector.model.settings.backbone.name == "tiny"
    assert detector.convention.name == "continuous"
    assert not detector.model.training


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["backbone=r99"], ["backbone/r99", "r50", "x101_dcn"]),
        (["trainer.devces=8"], ["trainer.devces", "did you mean devices?", "precision"]),
        (["no_such=1"], ["no_such", "backbone", "schedule"]),
        (["schedule.max_steps=many"], ["schedule.max_steps=many", "integer"]),
        (["detector.score_threshold=3"], ["detector.score_threshold=3", "0 to 1"]),
        (["detector.nms_iou=-1"], ["detector.nms_iou=-1", "0 to 1"]),
        (["detector.point_channels=10"], ["detector.point_channels=10", "multiple of 4"]),
        (["ops.deform=fast"], ["ops.deform=fast", "compiled", "torchvision"]),
        (["detector.convention=round"], ["detector.convention=round", "continuous", "inclusive"]),
        (["schedule.optimizer=lion"], ["schedule.optimizer=lion", "sgd", "adamw"]),
        (["schedule.milestones=[9,1]"], ["schedule.milestones", "ascending"]),
        (["data.flip_probability=2"], ["data.flip_probability=2", "0 to 1"]),
        (["cmm.stages=[]"], ["cmm.stages", "at least one"]),
        (["cmm.stages.0.positive_iou=7"], ["cmm.stages[0].positive_iou=7", "0 to 1"]),
        (["backbone=r18", "backbone.weights=nowhere.pth"], ["backbone.weights=nowhere.pth"]),
        (["trainer.precision=7"], ["trainer.precision=7", "32-true", "bf16-mixed"]),
        (["data=coco", "data.root=nowhere"], ["nowhere", "annotations/instances_train2017.json", "cocodataset.org"]),
        (["data=custom"], ["data.root=FOLDER", "data.train_json="]),
        (["schedule.milestones=5"], ["schedule.milestones=5", "list"]),
        (["schedule.short_sides=128"], ["schedule.short_sides=128", "list"]),
        (["detector.anchor_sizes=32"], ["detector.anchor_sizes=32", "list"]),
        (["cmm.stages=3"], ["cmm.stages=3", "list"]),
        (["seed=-1"], ["seed=-1", "integer"]),
        (["sheet_images=-1"], ["sheet_images=-1", "integer"]),
        (["data.num_workers=0.5"], ["data.num_workers=0.5", "integer"]),
        (["trainer.accelerator=xyz"], ["trainer.accelerator=xyz", "auto, cpu, gpu"]),
        (["trainer.limit_val_batches=0"], ["trainer.limit_val_batches=0"]),
        (["trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches=0"]),
        (["resume=nowhere.ckpt"], ["nowhere.ckpt", "no such file"]),
    ],
)
def test_train_refuses_an_invalid_option_in_one_line(command, arguments, parts):
    small = [o for o in SMALL if not (o.startswith("data.") and arguments[0].startswith("data="))]
    line = refused(command("train", *small, *arguments))
    for part in parts:
        assert part in line


def test_eval_and_predict_refuse_files_that_are_not_their_checkpoints(command, checkpoint, workplace):
    damaged = workplace / "damaged.ckpt"
    damaged.write_bytes(checkpoint.read_bytes()[:5000])
    foreign = workplace / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["model"]["mlp_channels"] = 24
    other = workplace / "other.ckpt"
    torch.save(content, other)
    cases = []
    for name, change in {
        "no_weights": lambda c: c.pop("state_dict"),
        "list": lambda c: c.update(hyper_parameters=[5]),
        "no_format": lambda c: c["hyper_parameters"].pop("format"),
        "newer": lambda c: c["hyper_parameters"].update(format=99),
        "model_3": lambda c: c["hyper_parameters"].update(model=3),
        "body": lambda c: c["hyper_parameters"]["model"].update(backbone=5),
        "no_tensor": lambda c: c["state_dict"].update({"model.rpn.head.cls_logits.bias": "x"}),
        "key": lambda c: c["hyper_parameters"]["model"]["backbone"].update(depth=3),
    }.items():
        content = torch.load(checkpoint, weights_only=True)
        change(content)
        torch.save(content, workplace / f"{name}.ckpt")
        cases.append((workplace / f"{name}.ckpt", ""))
    for path, part in (
        *cases,
        (workplace / "none.ckpt", "no such file"),
        (damaged, "damaged"),
        (foreign, "not a checkpoint of cpm_rcnn"),
        (other, "does not fit"),
    ):
        for name, more in (("eval", ["trainer=cpu"]), ("predict", ["source=data/shapes/val"])):
            line = refused(command(name, f"ckpt={path}", *more))
            assert path.name in line
            assert part in line
    assert "ckpt" in refused(command("eval"))


def test_eval_and_predict_refuse_splits_sources_and_devices_that_do_not_exist(command, checkpoint):
    assert "val, test" in refused(command("eval", f"ckpt={checkpoint}", "split=train"))
    assert "data.test_json" in refused(command("eval", f"ckpt={checkpoint}", "split=test"))
    assert "source=nowhere" in refused(command("predict", f"ckpt={checkpoint}", "source=nowhere"))
    assert "multi_scale.scales" in refused(
        command("eval", f"ckpt={checkpoint}", "multi_scale=on", "multi_scale.scales=[]")
    )
    assert "device=" in refused(command("predict", f"ckpt={checkpoint}", "source=data/shapes/val", "device=tpu7"))


def test_a_missing_or_truncated_image_gives_one_line_even_from_a_worker(command, checkpoint, workplace):
    copy = workplace / "broken"
    if not copy.exists():
        shutil.copytree(workplace / "data/shapes", copy)
    victims = sorted((copy / "val").iterdir())
    victims[0].unlink()
    victims[1].write_bytes(victims[1].read_bytes()[:300])
    evaluation = ["eval", f"ckpt={checkpoint}", "trainer=cpu", f"data.root={copy}"]
    assert victims[0].name in refused(command(*evaluation))
    shutil.copy(workplace / "data/shapes/val" / victims[0].name, victims[0])
    for workers in (0, 1):
        line = refused(command(*evaluation, f"data.num_workers={workers}"))
        assert victims[1].name in line
        assert "damaged" in line


def test_training_with_a_missing_image_ends_before_a_model_is_built(command, trained, workplace, monkeypatch):
    copy = workplace / "missing"
    shutil.copytree(workplace / "data/shapes", copy)
    (copy / "val/000002.jpg").unlink()
    monkeypatch.setattr("cpm_rcnn.commands.train.build_module", None)
    line = refused(command("train", *SMALL, f"data.root={copy}", "name=missing"))
    assert "missing/val: 1 of 5 images cannot be read (image 000002.jpg not found)" in line
    assert not (workplace / "outputs/missing/checkpoints").exists()


def test_the_commands_work_from_a_wheel_outside_a_checkout(tmp_path):
    root = Path(__file__).parents[2]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    site = tmp_path / "site"
    # Neither a version of Python nor a platform: it contains the kernels' sources and no library.
    wheel = next(tmp_path.glob("*-py3-none-any.whl"))
    shutil.unpack_archive(wheel, site, "zip")
    assert not list(site.rglob("*.so"))
    for source in ("kernels/*.cpp", "kernels/*.h", "kernels/*.py", "kernels/README.md", "conf/**/*.yaml"):
        for path in root.glob(source):
            assert (site / "cpm_rcnn" / path.relative_to(root)).read_bytes() == path.read_bytes()
    assert (site / "cpm_rcnn/py.typed").is_file()
    for name in ("base.html", "check.html", "page.html", "parts.html", "style.css", "script.js"):
        assert (site / "cpm_rcnn/reporting/report" / name).is_file()
    shown = subprocess.run(
        [sys.executable, "-m", "cpm_rcnn.train", "--cfg", "job", "experiment=quickstart"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert "name: tiny" in shown.stdout
