"""Starting weights: what fits by role, shape and class name is taken from a trained detector."""

import pytest
import torch

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.weights.initialize import initialize
from cpm_rcnn.weights.starting import StartingDetector, read_starting_detector
from peer_files import small_state
from small_models import same_values, small_module, write_trained

LAYOUT = {"name": "resnet", "layout": {"blocks": [1, 1, 1, 1]}}
# The sizes of the small files of other programs.
SIZES = {"fpn_channels": 16, "mlp_channels": 8}
GRID = {"point_channels": 4, "grid_convs": 8}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    return path, write_trained(path).model.state_dict()


def tiny(names=("cat", "dog"), **options):
    torch.manual_seed(1)
    options = {"fpn_channels": 16, "mlp_channels": 16, **options}
    if options.get("head", "cpm") == "cpm":
        options = {"point_channels": 4, "grid_convs": 1, **options}
    return build_detector("tiny", len(names), **options)


def random_start(names, **options):
    """A detector with random weights to start from."""
    torch.manual_seed(2)
    detector = tiny(names, **options)
    state = {name: torch.randn_like(value) for name, value in detector.state_dict().items()}
    return StartingDetector("init=x", detector.settings, list(names), len(names), state)


def parts(rows, taken):
    return [row.part for row in rows if row.taken == taken]


def grid_parts(*stages):
    return [f"head.stages.{k}.{name}" for k in stages for name in ("convs", "deconvs")]


def details(rows):
    return {row.part: row.details for row in rows}


# --- checkpoints of this project ---


def test_without_init_and_without_pretrained_weights_nothing_changes():
    model = small_module().model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert initialize(model) == []
    assert same_values(model.state_dict(), before)


def test_all_weights_are_taken_if_model_and_classes_are_the_same(trained):
    path, expected = trained
    model = small_module().model
    assert not same_values(model.state_dict(), expected)
    rows = initialize(model, ["cat", "dog"], start=read_starting_detector(path))
    assert same_values(model.state_dict(), expected)
    assert parts(rows, False) == []
    assert parts(rows, True) == [
        "backbone.body",
        "backbone.fpn",
        "rpn",
        "head.classifier",
        *grid_parts(0, 1, 2),
        "head.ism",
        "head.rsm",
    ]
    assert {row.details for row in rows} == {"from the file", "from the file; all classes"}


def test_a_run_s_folder_means_its_best_checkpoint(trained, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.ckpt").write_bytes(trained[0].read_bytes())
    assert same_values(read_starting_detector(tmp_path).state, trained[1])


def test_parts_of_other_widths_are_initialized_and_named():
    start, model = random_start(["cat", "dog"]), tiny(mlp_channels=24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = initialize(model, ["cat", "dog"], start=start)
    assert parts(rows, False) == ["head.classifier", "head.rsm"]
    assert details(rows)["head.rsm"] == "initialized: head.rsm of the file has other names or shapes"
    for name, value in model.state_dict().items():
        expected = before if name.startswith(("head.classifier.", "head.rsm.")) else start.state
        assert torch.equal(value, expected[name]), name


def test_a_stage_with_another_mapping_ratio_is_another_part_unless_stages_are_repeated():
    stages = [{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0}] * 2
    start = random_start(["cat"], stages=stages)
    rows = initialize(tiny(["cat"]), ["cat"], start=start)
    assert parts(rows, False) == grid_parts(1, 2)
    model = tiny(["cat"])
    rows = initialize(model, ["cat"], start=start, repeat_stages=True)
    assert parts(rows, False) == []
    assert details(rows)["head.stages.2.convs"] == "from head.stages.1.convs of the file"
    for k, source in ((0, 0), (1, 1), (2, 1)):
        name = "deconvs.0.weight"
        assert torch.equal(model.state_dict()[f"head.stages.{k}.{name}"], start.state[f"head.stages.{source}.{name}"])


# --- classes ---


def test_rows_of_classes_are_taken_by_name_and_others_keep_their_initial_values():
    start = random_start(["dog", "horse", "Cat "], head="faster")
    names = ["cat", "cow", "dog"]
    model = tiny(names, head="faster")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = initialize(model, names, start=start)
    assert details(rows)["head.stages.0.classifier"].endswith("; 2 of 3 classes by name, initialized: cow")
    after = model.state_dict()
    for kind in ("weight", "bias"):
        name = f"head.stages.0.classifier.predictor.{kind}"
        theirs = start.state[name]
        assert torch.equal(after[name], torch.stack([theirs[0], theirs[3], before[name][2], theirs[1]]))
        name = f"head.stages.0.regressor.{kind}"
        theirs = start.state[name]
        assert torch.equal(after[name], torch.cat([theirs[8:], before[name][4:8], theirs[:4]]))


def test_without_a_common_class_the_classification_layers_stay_initialized():
    start, model = random_start(["a", "b", "c"]), tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = initialize(model, ["cat", "dog"], start=start)
    assert "no class of that name" in details(rows)["head.classifier"]
    after = model.state_dict()
    for part in ("head.classifier", "head.rsm"):
        assert torch.equal(after[f"{part}.predictor.weight"], before[f"{part}.predictor.weight"])
        assert torch.equal(after[f"{part}.mlp.fc6.weight"], start.state[f"{part}.mlp.fc6.weight"])


def test_classes_in_another_order_are_taken_by_name():
    start, model = random_start(["dog", "cat"]), tiny()
    rows = initialize(model, ["cat", "dog"], start=start)
    assert details(rows)["head.classifier"] == "from the file; all classes, by name"
    name = "head.classifier.predictor.weight"
    assert torch.equal(model.state_dict()[name], start.state[name][[0, 2, 1]])


# --- other heads ---


def test_a_cascade_starts_from_a_faster_rcnn_and_the_reverse():
    start, model = random_start(["cat", "dog"], head="faster"), tiny(head="cascade", ism=True, rsm=True)
    rows = initialize(model, ["cat", "dog"], start=start)
    # Faster R-CNN predicts a box for each class, Cascade R-CNN one for all.
    assert parts(rows, True) == ["backbone.body", "backbone.fpn", "rpn", "head.stages.0.classifier"]
    rows = initialize(tiny(head="cascade"), ["cat", "dog"], start=start, repeat_stages=True)
    assert details(rows)["head.stages.2.classifier"] == "from head.stages.0.classifier of the file; all classes"
    rows = initialize(tiny(head="faster"), ["cat", "dog"], start=random_start(["cat", "dog"], head="cascade", rsm=True))
    assert parts(rows, False) == ["head.stages.0.regressor"]


def test_a_cpm_head_takes_classification_and_rsm_of_a_cascade_but_not_its_ism():
    start = random_start(["cat", "dog"], head="cascade", ism=True, rsm=True)
    model = tiny()
    rows = initialize(model, ["cat", "dog"], start=start)
    assert parts(rows, False) == [*grid_parts(0, 1, 2), "head.ism"]
    assert details(rows)["head.classifier"] == "from head.stages.0.classifier of the file; all classes"
    assert details(rows)["head.ism"] == "initialized: the file has no such part"
    name = "mlp.fc7.weight"
    assert torch.equal(model.state_dict()[f"head.classifier.{name}"], start.state[f"head.stages.0.classifier.{name}"])


# --- files of other programs ---


@pytest.mark.parametrize("case", ["torchvision", "d2_faster_r50", "d2_cascade_r50", "mmdet_faster", "mmdet_grid_r50"])
def test_a_full_cpm_rcnn_starts_from_a_detector_of_another_program(tmp_path, case):
    path = tmp_path / "other.pth"
    state = small_state(case)
    predictor = next(name for name in state if name.endswith(("cls_score.weight", "fc_cls.weight")))
    # Row k has the value k.
    rows = torch.arange(len(state[predictor]), dtype=torch.float32)
    state[predictor] = rows[:, None].repeat(1, state[predictor].shape[1])
    torch.save(state, path)
    start = read_starting_detector(path)
    assert start.notes
    names = ["dog", "unicorn", "person"]
    backbone = {**LAYOUT, "input_format": start.settings.backbone.resolved_format}
    model = build_detector(backbone, len(names), **SIZES, **GRID)
    report = initialize(model, names, start=start, repeat_stages=True)
    missing = [] if "grid" in case else grid_parts(0, 1, 2)
    assert parts(report, False) == [*missing, "head.ism", "head.rsm"]
    assert details(report)["head.classifier"].endswith("2 of 3 classes by name, initialized: unicorn")
    background, dog, unicorn, person = model.head.classifier.predictor.weight[:, 0].tolist()
    # torchvision numbers its classes by COCO's ids, from the background on; the others have the background last.
    expected = (0, 18, 1) if case == "torchvision" else (80, 16, 0)
    assert (background, dog, person) == expected
    assert abs(unicorn) < 0.1
    assert model.backbone.fpn.inner_blocks[0][0].weight.eq(0.5).all()


def test_another_input_format_is_refused_with_both(tmp_path):
    torch.save(small_state("d2_faster_r50"), tmp_path / "d2.pth")
    start = read_starting_detector(tmp_path / "d2.pth")
    model = build_detector(LAYOUT, 3, **SIZES, **GRID)
    with pytest.raises(UserError, match=r"^init=.*d2\.pth: its backbone needs input_format=.*bgr.*; backbone\.input_"):
        initialize(model, ["a", "b", "c"], start=start)


def test_another_backbone_is_refused_with_both_names(tmp_path):
    torch.save(small_state("torchvision"), tmp_path / "tv.pth")
    start = read_starting_detector(tmp_path / "tv.pth")
    with pytest.raises(UserError, match=r"tv\.pth: its backbone, resnet, does not fit this model's, tiny"):
        initialize(tiny(), ["cat", "dog"], start=start)


def test_deformable_layers_start_from_ordinary_ones_but_not_the_reverse(tmp_path):
    torch.save(small_state("torchvision"), tmp_path / "tv.pth")
    start = read_starting_detector(tmp_path / "tv.pth")
    model = build_detector({**LAYOUT, "deformable_stages": [4, 5]}, 3, **SIZES, **GRID)
    assert initialize(model, ["a", "b", "c"], start=start)[0].taken
    assert (model.backbone.body.layers[2][0].conv2.conv_offset.weight == 0).all()
    assert (model.backbone.body.layers[2][0].conv2.weight == 0.5).all()
    other = StartingDetector("init=x", model.settings, ["a"], 3, model.state_dict())
    with pytest.raises(UserError, match="does not fit"):
        initialize(build_detector(LAYOUT, 3, **SIZES, **GRID), ["a", "b", "c"], start=other)


def test_unknown_class_names_leave_the_classification_layers_initialized(tmp_path):
    start = random_start(["cat", "dog"])
    unknown = StartingDetector("init=x", start.settings, [], 2, start.state)
    rows = initialize(tiny(), ["cat", "dog"], start=unknown)
    assert "no class of that name" in details(rows)["head.classifier"]


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"^init=.*none\.ckpt: no such file"):
        read_starting_detector(tmp_path / "none.ckpt")
