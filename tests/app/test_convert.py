"""Released weights with the commands: convert, then evaluate, predict and fine-tune as with any checkpoint."""

import json
import re

import pytest
import torch
from runs import metrics, refused
from small_run import SMALL
from torchvision.io import write_png

from cpm_rcnn import from_release, load
from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from peer_files import small_shapes
from release_files import case_image, case_state


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A released file of the smallest reference model."""
    file = tmp_path_factory.mktemp("released") / "released.pth"
    torch.save({"model": {f"module.{name}": value for name, value in case_state("rsm2_tiny").items()}}, file)
    return file


@pytest.fixture
def converted(command, released):
    """That file's checkpoint."""
    target = released.with_name("converted.ckpt")
    if not target.exists():
        answer = command("convert", f"src={released}", f"dst={target}")
        assert answer.status == 0, answer.err
        assert answer.out.splitlines() == [
            "resnet, 80 classes, 2 grid stages, RSM; 9.6 million values",
            "note: not one of the three published models; check that the file is complete",
            str(target),
        ]
    return target


def test_a_converted_checkpoint_equals_the_release_bit_for_bit(converted, released):
    image, detector = case_image("rsm2_tiny"), load(converted)
    ours, theirs = detector.model.state_dict(), from_release(released).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.inference_mode():
        through_file, straight = detector.model([image])[0], from_release(released)([image])[0]
    assert len(straight["scores"]) > 100
    assert all(torch.equal(through_file[key], straight[key]) for key in straight)
    assert detector.categories == COCO_CATEGORIES
    assert detector.convention.name == "inclusive"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three pictures with COCO's classes in COCO's format."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "images").mkdir()
    images, annotations = [], []
    for i in range(3):
        image = case_image("base_tiny")[:, : 160 + 32 * i]
        write_png(image, str(root / f"images/{i}.png"))
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": image.shape[1], "width": image.shape[2]})
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 90, "bbox": [10, 20, 60, 70], "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": COCO_CATEGORIES}
    (root / "photographs.json").write_text(json.dumps(content))
    return root


def on(photographs):
    return [
        "trainer=cpu",
        f"split={photographs}/photographs.json",
        f"images={photographs}/images",
        "data.num_workers=0",
        "data.test_short_side=160",
        "detector.proposals_test=30",
    ]


def test_eval_and_predict_read_it_like_any_checkpoint(command, converted, photographs):
    answer = command("eval", f"ckpt={converted}", *on(photographs))
    assert answer.status == 0, answer.err
    assert len(metrics(answer.folder)["per_class"]) == 80
    detections = json.loads((answer.folder / "detections.json").read_text())
    assert {each["image_id"] for each in detections} == {1, 2, 3}
    assert {each["category_id"] for each in detections} <= {category["id"] for category in COCO_CATEGORIES}
    answer = command("predict", f"ckpt={converted}", f"source={photographs}/images/0.png", "detector.proposals_test=30")
    assert answer.status == 0, answer.err
    assert (answer.folder / "images/0.png.png").is_file()


def test_eval_can_skip_parts(command, converted, photographs):
    found = []
    for more in ([], ["detector.rsm=false"], ["detector.test_stages=1"]):
        answer = command("eval", f"ckpt={converted}", *on(photographs), *more)
        assert answer.status == 0, answer.err
        found.append(json.loads((answer.folder / "detections.json").read_text()))
    whole, without_rsm, one_stage = ({(d["image_id"], *d["bbox"]) for d in each} for each in found)
    assert whole == without_rsm
    assert whole != one_stage
    assert sorted(d["score"] for d in found[0]) != sorted(d["score"] for d in found[1])


def test_a_part_is_skipped_by_false_only(command, converted, photographs):
    assert "detector.rsm=off: must be true or false" in refused(
        command("eval", f"ckpt={converted}", *on(photographs), "detector.rsm=off")
    )
    line = refused(command("eval", f"ckpt={converted}", *on(photographs), "detector.ism=true"))
    assert "missing: head.ism" in line


def test_a_test_list_without_annotations_gives_the_server_s_json(command, converted, photographs, tmp_path):
    content = json.loads((photographs / "photographs.json").read_text())
    del content["annotations"]
    (tmp_path / "image_info.json").write_text(json.dumps(content))
    arguments = [a for a in on(photographs) if not a.startswith("split")]
    answer = command("eval", f"ckpt={converted}", f"split={tmp_path}/image_info.json", *arguments)
    assert answer.status == 0, answer.err
    detections = json.loads((answer.folder / "detections.json").read_text())
    assert detections
    assert all(set(each) == {"image_id", "category_id", "bbox", "score"} for each in detections)


RELEASE = ["experiment=release_r50", "overwrite=true"]
FINE_TUNING = [
    "schedule.max_steps=2",
    "schedule.val_interval=2",
    "schedule.images_per_device=1",
    "schedule.warmup_steps=0",
    "data=shapes",
    "data.train_count=6",
    "data.val_count=5",
    "data.num_workers=0",
    "data.short_sides=[96]",
    "data.test_short_side=96",
    "detector.proposals_test=20",
    "detector.samples=32",
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
    "sheet_images=0",
]
# The small reference model as config overrides.
SAME_MODEL = [
    "backbone.layout={blocks:[1,1,1,1],groups:1,width_per_group:64}",
    "backbone.name=resnet",
    "cmm=two_stage",
    "ism=off",
    "detector.fpn_channels=64",
    "detector.mlp_channels=64",
    "detector.point_channels=8",
]


def test_training_starts_from_a_converted_checkpoint_with_other_classes(command, converted, released):
    answer = command(
        "train", "experiment=release_r50", "overwrite=true", f"init={converted}", *SAME_MODEL, *FINE_TUNING
    )
    assert answer.status == 0, answer.err
    rows = dict(re.findall(r"│ (\S+) +│ (.+?) *│", answer.out))
    assert rows["backbone.body"] == "from the file"
    assert rows["head.rsm"].startswith("from the file; classification layers initialized")
    tuned = load(answer.folder / "checkpoints/last.ckpt")
    start = from_release(released).state_dict()
    assert len(tuned.class_names) == 5
    ours = tuned.model.state_dict()
    # Stem and C2 are frozen, other layers have changed a little, and only the classification layers are new.
    assert torch.equal(ours["backbone.body.layers.0.0.conv2.weight"], start["backbone.body.layers.0.0.conv2.weight"])
    moved = (ours["rpn.head.conv.0.0.weight"] - start["rpn.head.conv.0.0.weight"]).abs()
    assert 0 < moved.max() < 0.1
    assert ours["head.classifier.predictor.weight"].shape == (6, 64)
    # Resuming does not need the ImageNet file that the config names.
    more = [*SAME_MODEL, *FINE_TUNING, "schedule.max_steps=3", f"resume={answer.folder}/checkpoints/last.ckpt"]
    answer = command("train", *RELEASE, *more)
    assert answer.status == 0, answer.err


def test_starting_from_another_backbone_and_resuming_without_a_run_are_refused(command, converted):
    line = refused(command("train", *RELEASE, f"init={converted}", *SAME_MODEL[2:], *FINE_TUNING))
    assert "its backbone, resnet, does not fit this model's, resnet50" in line
    line = refused(command("train", *SMALL, f"init={converted}"))
    assert "its backbone, resnet, does not fit this model's, tiny" in line
    assert "init=" in refused(command("train", *SMALL, f"resume={converted}"))
    assert "init and resume" in refused(command("train", *SMALL, f"resume={converted}", f"init={converted}"))


def test_a_cpm_rcnn_starts_from_detectron2_s_faster_rcnn_and_reads_what_its_weights_know(command, tmp_path):
    torch.manual_seed(0)
    state = {name: 0.01 * torch.randn(shape) for name, shape in small_shapes("d2_faster_r50").items()}
    torch.save(
        state | {name: torch.ones(len(state[name])) for name in state if "running_var" in name}, tmp_path / "d2.pth"
    )
    backbone = ["backbone=r50", *SAME_MODEL[:2], "backbone.weights=null", "detector.fpn_channels=16"]
    sizes = ["head_size.mlp_channels=8", "head_size.point_channels=4", "head_size.grid_convs=1", *FINE_TUNING]
    run = [*backbone, *sizes, f"init={tmp_path}/d2.pth", "name=from_d2", "schedule.base_lr=0"]
    answer = command("train", *run)
    assert answer.status == 0, answer.err
    rows = dict(re.findall(r"│ (\S+) +│ (.+?) *│", answer.out))
    assert rows["head.classifier"].startswith("from head.stages.0.classifier of the file")
    assert rows["head.stages.0.convs"] == "initialized: the file has no such part"
    assert "detectron2 Faster R-CNN, resnet, 80 classes" in answer.out
    settings = load(answer.folder / "checkpoints/last.ckpt").model.settings
    assert (settings.backbone.input_format.order, settings.backbone.input_format.stride_in_1x1) == ("bgr", True)
    assert settings.trunk.convention == "continuous"
    # A run that resumes has the input format of the run, without the file.
    (tmp_path / "d2.pth").unlink()
    answer = command("train", *run, "schedule.max_steps=3", "resume=auto")
    assert answer.status == 0, answer.err


def test_init_takes_all_weights_of_a_trained_checkpoint(command, checkpoint):
    answer = command("train", *SMALL, f"init={checkpoint}", "schedule.base_lr=0", "sheet_images=0", "name=again")
    assert answer.status == 0, answer.err
    ours, theirs = load(answer.folder / "checkpoints/last.ckpt").model, load(checkpoint).model
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


def modified(state, fault):
    if fault == "a missing stage":
        return {name: value for name, value in state.items() if "grid_1" not in name or "Output" in name}
    if fault == "a wrong class count":
        sizes = [(part, *kind) for part in ("cls", "rescore") for kind in (("weight", 21, 64), ("bias", 21))]
        return state | {
            f"Grid_Cascade_RCNN.Output_{part}.cls_score.{kind}": torch.zeros(shape) for part, kind, *shape in sizes
        }
    return state


@pytest.mark.parametrize("fault", ["a missing stage", "a wrong class count", "cut", "an existing file"])
def test_convert_refuses_in_one_line_and_writes_nothing(command, released, tmp_path, fault):
    source, target = tmp_path / "source.pth", tmp_path / "out" / "target.ckpt"
    torch.save(modified(case_state("rsm2_tiny"), fault), source)
    if fault == "cut":
        source.write_bytes(source.read_bytes()[:-1000])
    if fault == "an existing file":
        target.parent.mkdir()
        target.write_text("precious")
    line = refused(command("convert", f"src={source}", f"dst={target}"))
    expected = {
        "a missing stage": "missing: Grid_Cascade_RCNN.Head_grid_1",
        "a wrong class count": "has 20 classes, but COCO has 80",
        "cut": "truncated",
        "an existing file": "exists already",
    }
    assert expected[fault] in line
    if fault == "an existing file":
        assert target.read_text() == "precious"
        assert [p.name for p in target.parent.iterdir()] == ["target.ckpt"]
    else:
        assert not target.parent.exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p != target.parent) == ["source.pth"]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("{}/released.pth/x.ckpt", "x.ckpt"),
        ("{}/" + "x" * 300, "too long"),
        ("null", "dst=null"),
        ("{}", "is a folder"),
    ],
)
def test_a_path_that_cannot_be_written_gives_one_line(command, released, target, says):
    assert says in refused(command("convert", f"src={released}", f"dst={target.format(released.parent)}"))
    assert not list(released.parent.glob("*.part"))


def test_a_json_names_classes_other_than_coco_s(command, released, tmp_path):
    state = modified(case_state("rsm2_tiny"), "a wrong class count")
    torch.save(state, tmp_path / "voc.pth")
    categories = [{"id": 3 * i, "name": f"class {i}"} for i in range(20)]
    image = {"id": 1, "file_name": "x.png", "height": 2, "width": 2}
    (tmp_path / "voc.json").write_text(json.dumps({"images": [image], "annotations": [], "categories": categories}))
    target = tmp_path / "voc.ckpt"
    answer = command("convert", f"src={tmp_path}/voc.pth", f"dst={target}", f"categories={tmp_path}/voc.json")
    assert answer.status == 0, answer.err
    assert load(target).categories == categories
