"""Released weights: the same results as the release, and errors for anything that is not a released file."""

import pickle
import sys
import types
import warnings

import numpy as np
import pytest
import torch

import cpm_rcnn
from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.models.heads.classification import select_detections
from cpm_rcnn.models.heads.scoring import rescore
from cpm_rcnn.models.pooling import pooling_format
from cpm_rcnn.weights.release import from_release, release_settings
from release_files import CASES, FULL, REFERENCE, case_image, case_state, merged, read_case, release_shapes, state_of

TINY = {
    "base_tiny": {"stages": 1, "ism": False, "rsm": False},
    "fused_tiny": {"stages": 1, "ism": False, "rsm": False, "fusion": True},
    "cmm3_tiny": {"ism": False, "rsm": False},
    "ism1_tiny": {"stages": 1, "rsm": False},
    "rsm2_tiny": {"stages": 2, "ism": False},
    "cpm_r50_tiny": {},
    "x101dcn_tiny": {"groups": 64, "width": 4, "deformable": True},
}
TINY_SIZES = {"fpn": 64, "mlp": 64, "point": 8}


def sample(feature):
    flat = feature.contiguous().flatten()
    return flat[:: max(1, flat.numel() // 512)][:512].numpy()


def share_found(boxes, scores, labels, expected, prefix):
    """The share of the release's detections that are among ours: same label, 0.05 pixels, 1e-4 of score."""
    found = [
        ((labels == label) & (np.abs(boxes - box).max(1) < 0.05) & (np.abs(scores - score) < 1e-4)).any()
        for box, score, label in zip(
            expected[f"{prefix}_boxes"], expected[f"{prefix}_scores"], expected["final_labels"]
        )
    ]
    assert len(found) == len(expected["final_labels"]) >= 100
    assert len(boxes) == pytest.approx(len(found), rel=0.01)
    return np.mean(found)


@pytest.mark.parametrize("case", CASES)
def test_a_released_model_reproduces_the_release_s_detections_stage_by_stage(case):
    detector, image = from_release(case_state(case), score_threshold=0.15), case_image(case)
    expected = np.load(REFERENCE / f"{case}.npz")
    head = detector.head
    with torch.inference_mode():
        batch, sizes = detector.preprocessor([image])
        batch = batch.contiguous(memory_format=torch.channels_last)
        maps = dict(zip(("c2", "c3", "c4", "c5"), detector.backbone.body(batch))) | detector.backbone(batch)
        for name, feature in maps.items():
            spread = expected[f"{name}_sample"].std()
            np.testing.assert_allclose(sample(feature), expected[f"{name}_sample"], atol=1e-3 * spread, rtol=0)
        features = [maps[f"p{level}"] for level in range(2, 7)]
        proposals, _ = detector.rpn(features, sizes)
        nearest = np.abs(expected["proposals"][:, None] - proposals.boxes.numpy()).max(-1).min(1)
        assert (nearest < 0.05).mean() >= 0.99
        assert len(proposals.boxes) == len(expected["proposals"])

        features = pooling_format(features)
        rois, scores, labels, _ = select_detections(
            torch.softmax(head.classifier(features, proposals), dim=1), proposals, score_threshold=0.15, nms_iou=0.3
        )
        assert share_found(rois.boxes.numpy(), scores.numpy(), labels.numpy(), expected, "cls") >= 0.99
        for k, stage in enumerate(head.stages):
            output = stage(features, rois)
            rois = stage.decode(output, rois)
            if k + 1 == len(head.stages) and head.ism is not None:
                scores = scores * head.ism.predicted_iou(output.features)
            assert share_found(rois.boxes.numpy(), scores.numpy(), labels.numpy(), expected, f"stage{k}") >= 0.99
        if head.rsm is not None:
            scores = rescore(scores, head.rsm.probability(labels, features, rois))
        found = detector([image])[0]
    assert torch.equal(found["boxes"], rois.boxes[scores.argsort(descending=True, stable=True)])
    boxes, scores, labels = (found[key].numpy() for key in ("boxes", "scores", "labels"))
    assert share_found(boxes, scores, labels, expected, "final") >= 0.99


@pytest.mark.parametrize("case", CASES)
def test_full_size_names_follow_the_pattern_of_the_reference_s_names(case):
    options = {"blocks": [1, 1, 1, 1]} | TINY[case] | TINY_SIZES
    assert release_shapes(**options) == {name: tuple(shape) for name, shape in read_case(case)["state_dict"]}


@pytest.mark.parametrize("model", FULL)
def test_the_architecture_is_derived_from_full_size_names(model):
    state = state_of(merged(release_shapes(**FULL[model])))
    detector = from_release(state)
    body = detector.backbone.body
    assert [len(stage) for stage in body.layers] == FULL[model]["blocks"]
    assert len(detector.head.stages) == 3
    assert detector.head.classifier.predictor.out_features == 81
    values = sum(value.numel() for name, value in detector.state_dict().items() if "running_" not in name) / 1e6
    assert values == pytest.approx({"r50": 153.9, "r101": 172.9, "x101_dcn": 216.9}[model], abs=0.06)
    # All values of the file were loaded; norms have neutral statistics in addition, which are buffers.
    assert all(torch.all(p == 0.5) for p in detector.parameters())


def test_full_size_r50_has_the_release_s_153_9_million_parameters():
    assert sum(np.prod(shape) for shape in merged(release_shapes(**FULL["r50"])).values()) == 153_888_590


@pytest.fixture(scope="module")
def state():
    return case_state("rsm2_tiny")


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("wrap", ["bare", "model", "module", "both", "legacy"])
def test_a_file_may_be_bare_or_under_model_with_or_without_module(state, tmp_path, wrap):
    content = {f"module.{name}": value for name, value in state.items()} if wrap in ("module", "both") else state
    if wrap in ("model", "both"):
        content = {"model": content, "optimizer": {"state": {}, "param_groups": []}, "scheduler": {"iteration": 7}}
    # Files of 2020 are not zip archives.
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=wrap != "legacy")
    assert same_weights(from_release(tmp_path / "model.pth"), from_release(state))


def test_batch_norm_may_be_stored_merged_or_with_statistics(state):
    with_statistics = from_release(state)
    plain = dict(state)
    for name in [n for n in state if n.endswith("running_var")]:
        norm = name.removesuffix("running_var")
        mean, variance = plain.pop(f"{norm}running_mean"), plain.pop(name)
        scale = plain[f"{norm}weight"] * (variance + 1e-5).rsqrt()
        plain[f"{norm}weight"], plain[f"{norm}bias"] = scale, plain[f"{norm}bias"] - mean * scale
    merged_norms = from_release(plain)
    image = torch.randn(1, 3, 64, 64) * 50
    with torch.inference_mode():
        for ours, theirs in zip(merged_norms.backbone.body(image), with_statistics.backbone.body(image)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        norm, x = merged_norms.backbone.body.stem.bn1, torch.randn(1, 64, 4, 4)
        # Bit-equal to the release's affine layer.
        expected = x * plain["Conv_Body.bn1.weight"].view(-1, 1, 1) + plain["Conv_Body.bn1.bias"].view(-1, 1, 1)
        assert torch.equal(norm(x), expected)


def test_overrides_change_the_model_and_unknown_ones_are_refused_by_name(state):
    detector = from_release(state, score_threshold=0.4, nms_iou=0.6, test_stages=1, proposals_test=50)
    settings = detector.head.settings
    assert (settings.score_threshold, settings.nms_iou, settings.test_stages) == (0.4, 0.6, 1)
    assert detector.rpn.settings.proposals_test == 50
    with pytest.raises(ArgumentError, match=r"score: the head cpm has no such option; it has .*score_threshold"):
        from_release(state, score=0.4)
    with pytest.raises(ArgumentError, match=r"^test_stages=3: the model has 2"):
        from_release(state, test_stages=3)
    with pytest.raises(ArgumentError, match=r"^rsm=off: must be true or false"):
        from_release(state, rsm="off")


def test_ism_and_rsm_can_be_left_out_at_test():
    state, image = case_state("cpm_r50_tiny"), case_image("cpm_r50_tiny")
    whole = from_release(state, score_threshold=0.5)
    without = from_release(state, score_threshold=0.5, ism=False, rsm=False)
    assert without.head.ism is None
    assert without.head.rsm is None
    fewer = from_release(state, score_threshold=0.5, test_stages=2, rsm=False)
    with torch.inference_mode():
        found = [model([image])[0] for model in (whole, without, fewer)]
    # The boxes come from the cascade and do not depend on the scores.
    order = [each["boxes"].sum(1).argsort() for each in found]
    torch.testing.assert_close(found[0]["boxes"][order[0]], found[1]["boxes"][order[1]])
    assert not torch.allclose(found[0]["scores"], found[1]["scores"])
    assert not torch.allclose(found[1]["boxes"][order[1]], found[2]["boxes"][order[2]])
    # ISM reads the last stage, so it is skipped with fewer stages: the scores are the classifier's.
    torch.testing.assert_close(found[1]["scores"], found[2]["scores"])


def test_two_stages_are_those_of_the_ablation_by_default_and_can_be_overridden(state):
    settings = [stage.settings for stage in from_release(state).head.stages]
    assert [(s.positive_iou, s.mapping_ratio) for s in settings] == [(0.5, 1.0), (0.5, 1.0)]
    cascade = [{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0}] * 2
    cascade[1] = cascade[1] | {"mapping_ratio": 0.5}
    assert from_release(state, stages=cascade).head.stages[1].settings.mapping_ratio == 0.5


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


def reshaped(state, name, *shape):
    return dict(state) | {name: torch.zeros(shape)}


def flattened(state, name):
    return dict(state) | {name: state[name].flatten()}


NAN = torch.tensor(float("nan"))
DAMAGES = {
    "a missing grid head": (lambda s: without(s, "Head_grid_0"), ["missing", "Head_grid_0.convs.0.0.weight"]),
    "one lost convolution": (
        lambda s: without(s, "Head_grid_0.convs.7"),
        ["4 missing: Grid_Cascade_RCNN.Head_grid_0.convs.7.0.weight"],
    ),
    "a flat convolution": (lambda s: flattened(s, "Conv_Body.layer1.0.conv2.weight"), ["Conv_Body.layer1.0.conv2"]),
    "no outputs": (lambda s: reshaped(s, "Conv_Body_FPN.p5_in.weight", 0, 2048, 1, 1), ["fpn_channels=0"]),
    "not finite": (
        lambda s: dict(s) | {"RPN.head.conv.bias": NAN.expand(64)},
        ["tensors have non-finite values: RPN.head.conv.bias"],
    ),
    "complex numbers": (lambda s: dict(s) | {"RPN.head.conv.bias": torch.zeros(64) * 1j}, ["RPN.head.conv.bias"]),
    "no data": (lambda s: dict(s) | {"RPN.head.conv.bias": torch.zeros(64, device="meta")}, ["RPN.head.conv.bias"]),
    "numbers as names": (lambda s: dict(s) | {3: torch.zeros(1)}, ["contains the key 3; names must be strings"]),
    "a missing grid stage": (
        lambda s: without(s, "grid_0"),
        ["Grid_Cascade_RCNN.Output_grid_0.deconv_1.weight is missing"],
    ),
    "a missing backbone stage": (lambda s: without(s, "layer3"), ["missing", "Conv_Body.layer3.0.conv1.weight"]),
    "no backbone": (lambda s: without(s, "Conv_Body.layer1"), ["Conv_Body.layer1.0.conv2.weight is missing"]),
    "no head": (lambda s: without(s, "Grid_Cascade"), ["0 grid stages"]),
    "one lost tensor": (lambda s: without(s, "RPN.head.conv.bias"), ["1 missing: RPN.head.conv.bias"]),
    "one lost statistic": (lambda s: without(s, "layer1.0.bn2.running_mean"), ["1 missing: Conv_Body.layer1.0.bn2"]),
    "a wrong class count": (
        lambda s: reshaped(s, "Grid_Cascade_RCNN.Output_rescore.cls_score.weight", 41, 64),
        ["1 of another shape: Grid_Cascade_RCNN.Output_rescore.cls_score.weight (41, 64) instead of (81, 64)"],
    ),
    "an additional tensor": (
        lambda s: dict(s) | {"Mask_RCNN.conv.weight": torch.zeros(1)},
        ["1 unexpected: Mask_RCNN"],
    ),
    "three faults at once": (
        lambda s: reshaped(without(s, "RPN.head.conv.bias"), "RPN.head.cls_logits.bias", 9) | {"x": torch.zeros(1)},
        ["1 missing: RPN.head.conv.bias", "1 unexpected: x", "1 of another shape: RPN.head.cls_logits.bias"],
    ),
    "something other than a tensor": (
        lambda s: dict(s) | {"RPN.head.conv.bias": "no"},
        ["RPN.head.conv.bias is a str"],
    ),
    "other weights": (lambda s: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, ["not a released CPM R-CNN"]),
    "nothing": (lambda s: {}, ["contains nothing instead of named weights"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_faults_of_a_state_dict_are_listed_in_one_line(state, damage):
    change, expected = DAMAGES[damage]
    with pytest.raises(UserError) as caught:
        from_release(change(state))
    assert "\n" not in str(caught.value)
    for words in ["state_dict", *expected]:
        assert words in str(caught.value)


def test_a_stage_missing_within_the_cascade_is_listed():
    with pytest.raises(UserError, match=r"\d+ missing: Grid_Cascade_RCNN\.Head_grid_1\.convs\.0\.0\.weight"):
        from_release(without(case_state("cmm3_tiny"), "grid_1"))


class RunsCode:
    def __reduce__(self):
        return (warnings.warn, ("this ran",))


@pytest.mark.parametrize("name", ["Conv_Body.conv1.weight", "Conv_Body.layer1.0.conv1.weight"])
def test_numpy_arrays_of_either_byte_order_are_accepted(state, name):
    arrays = {key: value.numpy() for key, value in state.items()}
    arrays[name] = arrays[name].astype(">f4")
    assert same_weights(from_release(arrays), from_release(state))


def test_a_training_checkpoint_of_the_release_is_read_with_its_solver_s_settings(state, tmp_path, monkeypatch):
    # The release stores its scheduler, which contains settings of a class of its own and numpy scalars.
    module = types.ModuleType("pet.utils.collections")
    module.AttrDict = type("AttrDict", (dict,), {"__module__": module.__name__})
    for name in ("pet", "pet.utils", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    solver = module.AttrDict(BASE_LR=0.02)
    solver.immutable = True
    scheduler = {
        "solver": solver,
        "iteration": 180000,
        "info": {"best_acc": np.float64(0.4), "new_lr": np.float32(0.1)},
    }
    torch.save({"model": state, "scheduler": scheduler}, tmp_path / "model_latest.pth")
    torch.save({"model": state, "scheduler": scheduler}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    monkeypatch.undo()
    for name in ("model_latest.pth", "old.pth"):
        assert same_weights(from_release(tmp_path / name), from_release(state))


def test_a_flipped_bit_is_detected(state, tmp_path):
    file = tmp_path / "model.pth"
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pth: .*does not match its checksum"):
        from_release(file)


@pytest.mark.parametrize(
    "kind", ["truncated", "legacy truncated", "empty", "text", "code", "code in a pickle", "folder", "absent"]
)
def test_a_damaged_or_malicious_file_gives_one_line_and_no_code_is_executed(state, tmp_path, kind):
    file = tmp_path / ("model.pkl" if "pickle" in kind else "model.pth")
    if "truncated" in kind:
        torch.save(state, file, _use_new_zipfile_serialization="legacy" not in kind)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif kind in ("empty", "text"):
        file.write_bytes(b"" if kind == "empty" else b"not weights at all, not even a little")
    elif kind == "code":
        torch.save({"model": RunsCode()}, file)
    elif kind == "code in a pickle":
        file.write_bytes(pickle.dumps({"model": RunsCode()}))
    elif kind == "folder":
        file.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"src=.*model\.p") as caught:
            from_release(file)
    assert "\n" not in str(caught.value)
    if "code" in kind:
        assert "refused, it refers to the code _warnings.warn" in str(caught.value)


def test_from_release_is_part_of_the_public_interface():
    assert cpm_rcnn.from_release is from_release


def test_the_number_of_classes_is_derived_from_the_file():
    settings, num_classes = release_settings(case_state("base_tiny"), "x")
    assert num_classes == 80
    assert len(settings.head.stages) == 1
