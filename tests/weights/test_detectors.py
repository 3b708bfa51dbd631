"""Files of other programs' detectors: recognition, what they say about themselves, and damaged files."""

import pickle
import re
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from cpm_rcnn.data.coco_categories import COCO_CATEGORIES
from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.weights.detectors import convert_file
from cpm_rcnn.weights.reading import InertObject, read_file
from peer_files import legacy_names, read_peer, small_state
from release_files import case_state

CASES = ["d2_faster_r50", "d2_cascade_r50", "mmdet_cascade_r50", "mmdet_grid_r50", "torchvision"]


def save(content, folder, name="model.pth", **options):
    torch.save(content, folder / name, **options)
    return folder / name


def converted(content, folder, **options):
    return convert_file(save(content, folder), "src", **options)


def wide(state, groups, width):
    """The names and shapes of a ResNeXt-101 instead of one block per stage, from the state of a small case."""
    body = {}
    for name, value in state.items():
        match = re.match(r"(.*(?:res|layer))(\d)\.0\.(.*)", name)
        if not match or "fpn" in name:
            body[name] = value
            continue
        first = 2 if match[1].endswith("res") else 1
        stage = int(match[2]) - first
        outputs, middle = 256 * 2**stage, groups * width * 2**stage
        for block in range((3, 4, 23, 3)[stage]):
            if block and re.match(r"downsample|shortcut", match[3]):
                continue
            inputs = outputs if block else 64 if stage == 0 else outputs // 2
            shape = _block_shape(match[3], inputs, middle, outputs, width * 2**stage)
            if value.ndim:
                body[f"{match[1]}{match[2]}.{block}.{match[3]}"] = torch.tensor(0.5).expand(shape)
    return body


def _block_shape(name, inputs, middle, outputs, per_group):
    if re.match(r"conv\d\.weight|shortcut\.weight|downsample\.0\.weight", name):
        return {
            "conv1": (middle, inputs, 1, 1),
            "conv2": (middle, per_group, 3, 3),
            "conv3": (outputs, middle, 1, 1),
        }.get(name.split(".")[0], (outputs, inputs, 1, 1))
    return (outputs,) if re.match(r"conv3|bn3|shortcut|downsample", name) else (middle,)


@pytest.mark.parametrize(
    ("case", "says", "head", "convention"),
    [
        ("d2_faster_r50", "detectron2 Faster R-CNN, resnet, 80 classes", "faster", "detectron2"),
        ("d2_cascade_r50", "detectron2 Cascade R-CNN, resnet, 80 classes", "cascade", "detectron2"),
        ("mmdet_cascade_r50", "mmdetection Cascade R-CNN, resnet, 80 classes", "cascade", "mmdetection"),
        ("mmdet_faster", "mmdetection Faster R-CNN, resnet, 80 classes", "faster", "mmdetection"),
        ("mmdet_grid_r50", "mmdetection Grid R-CNN, resnet, 80 classes", "cpm", "mmdetection"),
        ("torchvision", "torchvision Faster R-CNN, resnet, 90 classes", "faster", "torchvision"),
    ],
)
def test_the_program_and_the_model_are_recognized_by_the_names(tmp_path, case, says, head, convention):
    found = converted(small_state(case), tmp_path)
    assert found.description == says
    trunk = found.settings.trunk
    assert (trunk.head, trunk.convention, trunk.fpn_channels) == (head, convention, 16)
    assert found.settings.head.max_detections == 100


def test_the_release_is_recognized_too(tmp_path):
    assert converted(case_state("base_tiny"), tmp_path).settings.trunk.convention == "inclusive"


@pytest.mark.parametrize(
    ("case", "groups", "width", "name", "input_format"),
    [
        ("d2_faster_r50", 1, 64, "resnet101", ("bgr", 1, True)),
        ("d2_faster_r50", 32, 8, "resnext101_32x8d", ("bgr", 57.375, False)),
        ("mmdet_cascade_r50", 1, 64, "resnet101", ("rgb", 0.229, False)),
        ("mmdet_cascade_r50", 32, 4, "resnext101_32x4d", ("rgb", 0.229, False)),
        ("mmdet_cascade_r50", 64, 4, "resnext101_64x4d", ("rgb", 0.229, False)),
        ("mmdet_faster", 64, 4, "resnext101_64x4d", ("rgb", 0.229, False)),
        ("mmdet_grid_r50", 32, 8, "resnext101_32x8d", ("bgr", 57.375, False)),
    ],
)
def test_larger_backbones_are_recognized_by_their_shapes(tmp_path, case, groups, width, name, input_format):
    found = converted(wide(small_state(case), groups, width), tmp_path)
    assert found.settings.backbone.name == name
    value = found.settings.backbone.resolved_format
    assert (value.order, value.std[0], value.stride_in_1x1) == input_format


def test_values_arrive_under_this_project_s_names_with_the_background_first(tmp_path):
    state = {name: torch.randn(value.shape) for name, value in small_state("mmdet_cascade_r50").items()}
    found = converted(state, tmp_path)
    theirs = state["roi_head.bbox_head.1.fc_cls.weight"]
    ours = found.state["head.stages.1.classifier.predictor.weight"]
    assert torch.equal(ours[0], theirs[-1])
    assert torch.equal(ours[1:], theirs[:-1])
    assert torch.equal(found.state["head.stages.2.regressor.bias"], state["roi_head.bbox_head.2.fc_reg.bias"])
    last = found.settings.head.stages[2]
    assert last.coder_weights == pytest.approx((1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067))
    assert found.settings.head.score_average == "logits"


def test_torchvision_s_background_deltas_are_dropped_and_its_batch_norm_has_no_epsilon(tmp_path):
    state = {name: torch.rand(value.shape) + 0.1 for name, value in small_state("torchvision").items()}
    # Adding any epsilon would change this one.
    state["backbone.body.bn1.running_var"][0] = 1e-7
    found = converted(legacy_names(state), tmp_path)
    assert torch.equal(
        found.state["head.stages.0.regressor.weight"], state["roi_heads.box_predictor.bbox_pred.weight"][4:]
    )
    norm, body = "backbone.body.stem.bn1", "backbone.body.bn1"
    scale = found.state[f"{norm}.weight"] / (found.state[f"{norm}.running_var"] + 1e-5).sqrt()
    expected = state[f"{body}.weight"] / state[f"{body}.running_var"].sqrt()
    torch.testing.assert_close(scale, expected)
    shift = found.state[f"{norm}.bias"] - found.state[f"{norm}.running_mean"] * scale
    torch.testing.assert_close(shift, state[f"{body}.bias"] - state[f"{body}.running_mean"] * expected)


def test_a_torchvision_model_with_plain_batch_norm_keeps_its_epsilon(tmp_path):
    state = small_state("torchvision")
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(3) for name in state if "running_var" in name
    }
    found = converted(state | counters, tmp_path)
    assert found.state["backbone.body.stem.bn1.running_var"][0] == 0.5
    assert "BatchNorm epsilon: 1e-05" in found.notes
    given = converted(state, tmp_path, norm_epsilon=1e-5)
    assert all(torch.equal(given.state[name], value) for name, value in found.state.items())
    with pytest.raises(ArgumentError, match=r"backbone\.norm_epsilon=-1: must be a number, 0 to 1"):
        converted(state, tmp_path, norm_epsilon=-1)
    with pytest.raises(ArgumentError, match="norm_epsilon: the head cascade has no such option"):
        converted(small_state("d2_cascade_r50"), tmp_path, norm_epsilon=0)


def test_torchvision_s_classes_have_coco_s_ids_and_ten_do_not_exist(tmp_path):
    categories = converted(small_state("torchvision"), tmp_path).categories
    assert [category["id"] for category in categories] == list(range(1, 91))
    missing = [category["name"] for category in categories if category not in COCO_CATEGORIES]
    assert missing == [f"N/A {key}" for key in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def test_torchvision_v2_and_unknown_downloads_are_refused(tmp_path):
    state = small_state("torchvision")
    v2 = state | {"backbone.fpn.inner_blocks.0.1.weight": torch.ones(16)}
    with pytest.raises(UserError, match="fasterrcnn_resnet50_fpn_v2"):
        converted(v2, tmp_path)
    with pytest.raises(UserError, match="src=torchvision:x: must be a file or one of torchvision:fasterrcnn_resnet50"):
        convert_file("torchvision:x", "src")


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "FasterRCNN_ResNet50_FPN_Weights.COCO_V1", "COCO_V1"])
def test_torchvision_downloads_its_weights(name, monkeypatch):
    asked = []

    def download(url, **arguments):
        asked.append((url, arguments["check_hash"]))
        return small_state("torchvision")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    assert convert_file(f"torchvision:{name}", "src").num_classes == 90
    assert asked[0][0].endswith("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    assert asked[0][1]

    def fail(url, **arguments):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"cannot download https.*no network.*download it elsewhere"):
        convert_file(f"torchvision:{name}", "src")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda: {"backbone.bottom_up.stem.conv1.weight": torch.ones(1, 1)}, "not a Faster or Cascade R-CNN"),
        (lambda: {"bbox_head.retina_cls.weight": torch.ones(1, 1)}, "not a Faster, Cascade or Grid R-CNN"),
        (lambda: {"backbone.body.0.0.weight": torch.ones(1, 1)}, "not a Faster R-CNN with ResNet and FPN"),
        (lambda: {"model.backbone.body.x": torch.ones(1)}, "is a checkpoint of this project already"),
        (lambda: {"encoder.weight": torch.ones(1)}, "not a detector of the CPM R-CNN release, detectron2, mmdetection"),
        (lambda: small_state("mmdet_cascade_r50") | {"roi_head.semantic_head.x": torch.ones(1)}, "1 unexpected"),
    ],
)
def test_other_models_are_refused_in_one_line(tmp_path, state, says):
    with pytest.raises(UserError, match=f"src=.*{says}") as caught:
        converted(state(), tmp_path)
    assert "\n" not in str(caught.value)


def test_mask_heads_and_constants_are_not_used_and_named(tmp_path):
    state = small_state("d2_faster_r50") | {
        "roi_heads.mask_head.deconv.weight": torch.ones(3),
        "roi_heads.keypoint_head.conv.weight": torch.ones(3),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.ones(3, 4),
        "pixel_mean": torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
        "pixel_std": torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1),
    }
    found = converted(state, tmp_path)
    assert found.notes[1:] == (
        "the mask head of the file is not used",
        "the keypoint head of the file is not used",
    )
    # The file's constants take precedence over the model zoo's.
    value = found.settings.backbone.resolved_format
    assert (value.order, value.mean[0], value.stride_in_1x1) == ("rgb", pytest.approx(123.675), False)


@pytest.mark.parametrize("statistics", ["running_mean", "running_"])
def test_detectron2_s_merged_batch_norms_get_neutral_statistics(tmp_path, statistics):
    state = {name: value for name, value in small_state("d2_faster_r50").items() if statistics not in name}
    if statistics == "running_":
        found = converted(state, tmp_path)
        assert torch.all(found.state["backbone.body.layers.0.0.bn1.running_var"] == 1)
    else:
        with pytest.raises(UserError, match=r"17 missing: backbone\.bottom_up\.stem\.conv1\.norm\.running_mean"):
            converted(state, tmp_path)


CAFFE = """
norm_cfg = dict(type='BN', requires_grad=False)
model = dict(
    type='CascadeRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(type='ResNet', depth=50, style='caffe'),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0)),
        bbox_head=[
            dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2])),
            dict(bbox_coder=dict(target_stds=[0.05, 0.05, 0.1, 0.1])),
            dict(bbox_coder=dict(target_stds=[0.04, 0.04, 0.08, 0.08]))]),
    rpn_head=dict(anchor_generator=dict(scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=500),
        rcnn=dict(score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6), max_per_img=50)))
"""


def with_config(text, key="cfg", case="mmdet_cascade_r50", **meta):
    return {"state_dict": small_state(case), "meta": {key: text, **meta}}


@pytest.mark.parametrize("key", ["cfg", "config"])
def test_mmdetection_s_configuration_decides_what_names_cannot_tell(tmp_path, key):
    found = converted(with_config(CAFFE, key), tmp_path)
    settings = found.settings
    value = settings.backbone.resolved_format
    assert (value.order, value.scale, value.mean, value.stride_in_1x1) == ("bgr", 1, (103.53, 116.28, 123.675), True)
    assert "from the configuration in the file" in found.notes[0]
    head = settings.head
    assert (head.score_threshold, head.nms_iou, head.max_detections) == (0.1, 0.6, 50)
    assert settings.rpn.proposals_test == 500
    assert head.stages[2].coder_weights == pytest.approx((25, 25, 12.5, 12.5))


def test_a_configuration_of_several_files_is_merged(tmp_path):
    changes = (
        "/home/x/caffe.py\n_base_ = './base.py'\nmodel = dict(backbone=dict(depth=101), neck=dict(_delete_=True))\n"
    )
    found = converted(with_config(f"configs/base.py\n{CAFFE}\n{changes}", "config"), tmp_path)
    assert found.settings.backbone.resolved_format.stride_in_1x1
    assert found.settings.head.max_detections == 50


@pytest.mark.parametrize(("node", "order"), [("type='DetDataPreprocessor'", "bgr"), ("type='Normalize'", "rgb")])
def test_the_order_of_the_channels_has_the_program_s_default(tmp_path, node, order):
    text = f"model = dict(data_preprocessor=dict({node}, mean=[1, 2, 3], std=[1, 1, 1]))"
    assert converted(with_config(text), tmp_path).settings.backbone.resolved_format.order == order


@pytest.mark.parametrize(
    "text", ["model = dict(", "x" * 2_000_000, "model = open('/etc/passwd')", "(" * 10_000, "\0", "model = 3", 7]
)
def test_a_configuration_that_cannot_be_parsed_is_ignored_and_not_executed(tmp_path, text):
    found = converted(with_config(text), tmp_path)
    assert "estimated from the first layer" in found.notes[0]


def test_differences_between_a_configuration_and_this_project_are_reported_or_refused(tmp_path):
    text = CAFFE.replace("sampling_ratio=0", "sampling_ratio=2").replace("type='nms'", "type='soft_nms'")
    text = text.replace("nms_pre=500", "nms_pre=2000")
    notes = converted(with_config(text), tmp_path).notes
    assert len(notes) == 4
    for words in ("2000 proposals per level and 500 per image", "uses soft_nms", "sampling_ratio=2"):
        assert any(words in note for note in notes)
    with pytest.raises(UserError, match=r"its anchors have scales=\[4\]; only \[8\] can be converted"):
        converted(with_config(CAFFE.replace("scales=[8]", "scales=[4]")), tmp_path)
    with pytest.raises(UserError, match="score_threshold=7"):
        converted(with_config(CAFFE.replace("score_thr=0.1", "score_thr=7")), tmp_path)


@pytest.mark.parametrize(("raw", "style"), [(False, "pytorch"), (True, "caffe")])
def test_without_a_configuration_the_style_is_estimated_and_can_be_overridden(tmp_path, raw, style):
    state = small_state("mmdet_cascade_r50")
    stem = {
        name: torch.rand(value.shape) + 0.5 for name, value in state.items() if re.match(r"backbone\.\w+1\.w", name)
    }
    state |= stem | {"backbone.conv1.weight": torch.randn(64, 3, 7, 7) * (1 / 64 if raw else 1) / 12}
    found = converted(state, tmp_path)
    assert f"style {style}, estimated" in found.notes[0]
    assert found.settings.backbone.resolved_format.stride_in_1x1 == raw
    found = converted(state, tmp_path, input_format="rgb" if raw else "caffe")
    assert found.settings.backbone.resolved_format.stride_in_1x1 != raw
    assert "(as given)" in found.notes[0]
    with pytest.raises(ArgumentError, match=r"backbone\.input_format=bgr: must be one of rgb, caffe, timm"):
        converted(state, tmp_path, input_format="bgr")


@pytest.mark.parametrize("entry", ["CLASSES", "dataset_meta"])
def test_mmdetection_s_class_names_are_read(tmp_path, entry):
    names = tuple(f"class {i}" for i in range(80))
    meta = {entry: names if entry == "CLASSES" else {"classes": names}}
    categories = converted(with_config(CAFFE, **meta), tmp_path).categories
    assert categories == [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    names = tuple(category["name"] for category in COCO_CATEGORIES)
    assert converted(with_config(CAFFE, CLASSES=names), tmp_path).categories == COCO_CATEGORIES


class HistoryBuffer:
    """Pickles like mmengine's, with references to its own methods."""

    def __init__(self):
        self.max_length = 10
        self._log_history = np.array([0.5, np.float64(0.25)])
        self._count_history = np.array([1, 2])

    def mean(self):
        raise AssertionError("this must not run")

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"mean": type(self).mean}}

    def __setstate__(self, state):
        raise AssertionError("this must not run")


class ConfigDict(dict):
    """Pickles like mmengine's, by a call with a plain dict."""

    def __reduce_ex__(self, protocol):
        return type(self), (dict(self),)


class Config:
    """Pickles like mmengine's: the state is a tuple that contains the content and the text."""

    def __init__(self, content, text):
        self.content, self.text = content, text

    def __getstate__(self):
        return self.content, "cascade_rcnn.py", self.text, {}

    def __setstate__(self, state):
        raise AssertionError("this must not run")


@pytest.fixture
def mmengine(monkeypatch):
    """Modules named like mmengine's while a file is written; reading it must not need them."""
    homes = {
        HistoryBuffer: "mmengine.logging.history_buffer",
        ConfigDict: "mmengine.config.config",
        Config: "mmengine.config.config",
    }
    with monkeypatch.context() as patched:
        for kind, home in homes.items():
            patched.setattr(kind, "__module__", home)
            parts = home.split(".")
            for i in range(1, len(parts) + 1):
                name = ".".join(parts[:i])
                patched.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
            setattr(sys.modules[home], kind.__name__, kind)
        patched.setattr(HistoryBuffer.mean, "__module__", homes[HistoryBuffer])
        yield patched


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_training_checkpoint_of_mmengine_is_read_without_mmengine(tmp_path, mmengine, archive, whole):
    content = ConfigDict(
        model=ConfigDict(
            backbone=ConfigDict(style="caffe"),
            data_preprocessor=ConfigDict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
        )
    )
    checkpoint = {
        "meta": {"cfg": Config(content, CAFFE) if whole else content, "seed": np.int64(3), "epoch": 12},
        "state_dict": small_state("mmdet_cascade_r50"),
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"lr": np.float32(0.1)}},
        "optimizer": {"state": {}, "param_groups": [ConfigDict(lr=0.1)]},
    }
    file = save(checkpoint, tmp_path, _use_new_zipfile_serialization=archive)
    mmengine.undo()
    assert "mmengine" not in sys.modules
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = convert_file(file, "src")
    assert "mmengine" not in sys.modules
    assert found.settings.backbone.resolved_format.stride_in_1x1
    assert "from the configuration in the file" in found.notes[0]
    buffer = read_file(file, "src")["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(buffer, InertObject)
    assert buffer.state["_log_history"].tolist() == [0.5, 0.25]
    assert buffer.state["statistics_methods"] == {"mean": None}


def test_a_file_that_names_too_many_classes_of_known_packages_is_refused(tmp_path, monkeypatch):
    kinds = [type(f"Kind{i}", (), {"__module__": "mmdet.many"}) for i in range(40)]
    with monkeypatch.context() as patched:
        module = types.ModuleType("mmdet.many")
        for kind in kinds:
            setattr(module, kind.__name__, kind)
        patched.setitem(sys.modules, "mmdet", types.ModuleType("mmdet"))
        patched.setitem(sys.modules, "mmdet.many", module)
        file = save({"meta": [kind() for kind in kinds], "state_dict": {}}, tmp_path)
    with pytest.raises(UserError, match=r"refused, it refers to the code mmdet\.many\.Kind32"):
        convert_file(file, "src")


class RunsCode:
    def __reduce__(self):
        return (warnings.warn, ("this ran",))


class LooksUpCode:
    """Reaches code by looking up an attribute of a class."""

    def __reduce__(self):
        return (getattr, (pickle.Unpickler, "load"))


DAMAGES = ["truncated", "bit flipped", "tensor missing", "wrong shape", "not finite", "code", "code looked up"]
# A tensor of each program, which the damages concern.
TENSOR = {
    "d2_faster_r50": "proposal_generator.rpn_head.conv.weight",
    "d2_cascade_r50": "roi_heads.box_predictor.2.bbox_pred.bias",
    "mmdet_cascade_r50": "rpn_head.rpn_conv.weight",
    "mmdet_grid_r50": "roi_head.grid_head.forder_trans.4.3.0.weight",
    "torchvision": "roi_heads.box_predictor.bbox_pred.weight",
}


def damaged(case, damage, folder):
    """A damaged file, and what the error says."""
    state, name = small_state(case), TENSOR[case]
    content = {"state_dict": state, "meta": {}}
    if damage == "tensor missing":
        del state[name]
        return save(content, folder), f"1 missing: {name}"
    if damage == "wrong shape":
        state[name] = torch.zeros(3, 5)
        return save(content, folder), f"1 of another shape: {name} (3, 5) instead of ("
    if damage == "not finite":
        state[name] = torch.full(state[name].shape, float("nan"))
        return save(content, folder), f"tensors have non-finite values: {name}"
    if damage.startswith("code"):
        content["meta"] = RunsCode() if damage == "code" else LooksUpCode()
        return save(content, folder), "refused, it refers to the code"
    # The only tensor with more than one element in the file.
    state[name] = torch.full(state[name].shape, 0.625)
    file = save(content, folder)
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[: len(data) * 2 // 3])
        return file, "truncated"
    data[data.index(np.full(4, 0.625, np.float32).tobytes()) + 5] ^= 4
    file.write_bytes(data)
    return file, "does not match its checksum"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_gives_one_line_and_no_code_is_executed(tmp_path, case, damage):
    file, says = damaged(case, damage, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as caught:
            convert_file(file, "src")
    line = str(caught.value)
    assert line.startswith(f"src={file}: ")
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize("damage", ["truncated", "length changed", "exponent changed", "code"])
def test_a_damaged_pickle_of_detectron2_gives_one_line(tmp_path, damage):
    state = {name: value.numpy() for name, value in small_state("d2_faster_r50").items()}
    name = "backbone.bottom_up.stem.conv1.weight"
    state[name] = np.full((64, 3, 7, 7), 0.625, np.float32)
    content = bytearray(
        pickle.dumps({"model": state, "__author__": "x", "more": RunsCode() if damage == "code" else 0})
    )
    start = content.index(np.full(4, 0.625, np.float32).tobytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "length changed":
        content[start - 4] ^= 8
    elif damage == "exponent changed":
        content[start + 403] ^= 0x40
    file = tmp_path / "model.pkl"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"src=.*model\.pkl: ") as caught:
            convert_file(file, "src")
    assert "\n" not in str(caught.value)
    if damage == "exponent changed":
        assert f"extremely large values: {name}" in str(caught.value)


def test_a_published_file_is_compared_with_the_checksum_in_its_name(tmp_path):
    file = save(small_state("mmdet_cascade_r50"), tmp_path, "cascade_rcnn_r50-00000000.pth")
    with pytest.raises(
        UserError, match=r"damaged, its SHA-256 begins with (\w{8}) and not as its name states"
    ) as caught:
        convert_file(file, "src")
    actual = re.search(r"begins with (\w{8})", str(caught.value))[1]
    file = file.rename(tmp_path / f"cascade_rcnn_r50-{actual}.pth")
    assert convert_file(file, "src").num_classes == 80


def test_peers_full_size_names_are_known(tmp_path):
    for case in CASES[:-1]:
        state = {name: torch.tensor(0.5).expand(tuple(shape)) for name, shape in read_peer(case)["state_dict"]}
        assert converted(state, tmp_path).settings.backbone.name == "resnet50"
