import pytest
import torch

from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.models.backbones import BackboneSettings
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.models.heads.cpm import CMM_STAGES

SMALL = {"fpn_channels": 16, "mlp_channels": 16, "point_channels": 4, "grid_convs": 1}
STAGE = CMM_STAGES[0].to_dict()


def number_of_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_default_detector_has_the_1539_million_parameters_of_the_release():
    with torch.device("meta"):
        detector = build_detector()
    # The release counts the affine weights and biases of frozen normalization, which are buffers here.
    affine = [b.numel() for n, b in detector.backbone.named_buffers() if n.endswith((".weight", ".bias"))]
    assert number_of_parameters(detector) + sum(affine) == 153_888_590


@pytest.mark.parametrize(
    ("backbone", "millions"),
    [
        ("resnet101", 172.8),
        ({"name": "resnext101_64x4d", "deformable_stages": (3, 4, 5)}, 216.7),
        ({"name": "resnet50", "input_format": "caffe"}, 153.8),
        (BackboneSettings("resnet50"), 153.8),
    ],
    ids=["resnet101", "deformable resnext101", "caffe", "settings"],
)
def test_backbones_of_the_paper_can_be_built_without_memory(backbone, millions):
    with torch.device("meta"):
        detector = build_detector(backbone, 80)
    assert isinstance(detector, TwoStageDetector)
    assert number_of_parameters(detector) / 1e6 == pytest.approx(millions, abs=0.06)
    assert {p.device.type for p in detector.parameters()} == {"meta"}


def test_parts_that_are_switched_off_are_not_built():
    def parts(**arguments):
        detector = build_detector("tiny", 3, **SMALL | arguments)
        return len(detector.head.stages), detector.head.ism is not None, detector.head.rsm is not None

    assert parts() == (3, True, True)
    assert parts(stages=CMM_STAGES[:1], ism=False, rsm=False) == (1, False, False)
    assert parts(ism=False) == (3, False, True)
    assert parts(rsm=False) == (3, True, False)


def test_stages_have_the_thresholds_ratios_and_weights_of_the_paper():
    detector = build_detector("tiny", 3, **SMALL)
    settings = [stage.settings for stage in detector.head.stages]
    assert [s.positive_iou for s in settings] == [0.5, 0.6, 0.7]
    assert [s.mapping_ratio for s in settings] == [1.0, 0.5, 0.25]
    assert [s.loss_weight for s in settings] == [1.0, 0.5, 0.25]
    weights = [stage.convs[0].weight for stage in detector.head.stages]
    assert not torch.equal(weights[0], weights[1])


def test_all_parts_share_the_box_convention(convention):
    detector = build_detector("tiny", 3, convention=convention.name, **SMALL)
    assert {m.convention for m in detector.modules() if hasattr(m, "convention")} == {convention}


def test_preprocessor_has_the_input_format_of_the_backbone():
    caffe = {"order": "bgr", "scale": 1.0, "mean": (102.9801, 115.9465, 122.7717), "std": (1.0, 1.0, 1.0)}
    backbone = {"name": "tiny", "input_format": caffe}
    detector = build_detector(backbone, 3, **SMALL)
    assert detector.preprocessor.flip_channels
    torch.testing.assert_close(detector.preprocessor.mean.flatten(), torch.tensor(caffe["mean"]))
    assert backbone == {"name": "tiny", "input_format": caffe}  # the mapping of the caller is not modified
    usual = build_detector("tiny", 3, **SMALL).preprocessor
    torch.testing.assert_close(usual.mean.flatten(), 255 * torch.tensor([0.485, 0.456, 0.406]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", 0),
        ("num_classes", 2.5),
        ("num_classes", "many"),
        ("head", "retina"),
        ("convention", "half"),
        ("fpn_channels", 0),
        ("mlp_channels", -1),
        ("grid_convs", 0),
        ("proposals_train", 0),
        ("proposals_test", 0),
        ("samples", 0),
        ("max_grid_rois", 0),
        ("score_threshold", 1.5),
        ("score_threshold", float("nan")),
        ("nms_iou", -0.1),
        ("point_channels", 6),
        ("point_channels", 0),
        ("anchor_sizes", (32, 64)),
        ("test_stages", 4),
    ],
)
def test_invalid_argument_is_a_user_error_that_names_it(name, value):
    with pytest.raises(UserError, match=f"^{name}="):
        build_detector("tiny", **{"num_classes": 3} | {name: value})


@pytest.mark.parametrize(
    ("stages", "name"),
    [
        ([], "stages="),
        ("three", "stages="),
        ([STAGE | {"positive_iou": 1.2}], r"stages\[0\]\.positive_iou="),
        ([STAGE, STAGE | {"mapping_ratio": -1.0}], r"stages\[1\]\.mapping_ratio="),
        ([STAGE | {"loss_weight": -1.0}], r"stages\[0\]\.loss_weight="),
        ([{"positive_iou": 0.5}], r"stages\[0\]: missing key mapping_ratio, loss_weight"),
        ([STAGE | {"iou": 0.5}], r"stages\[0\]: unknown key iou"),
    ],
)
def test_invalid_stage_is_a_user_error_that_names_stage_and_argument(stages, name):
    with pytest.raises(ArgumentError, match=f"^{name}"):
        build_detector("tiny", 3, stages=stages, **SMALL)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (3, "backbone=3: must be a mapping"),
        ({"weights": None}, "backbone: missing key name"),
        ({"name": "tiny", "depth": 3}, "backbone: unknown key depth"),
        ("resnet51", "backbone.name=resnet51: "),
        ({"name": "resnet18", "frozen_stages": 6}, "backbone.frozen_stages=6: "),
        # Only timm knows whether it has the stem of a model.
        ({"name": "tf_efficientnet_lite0", "frozen_stages": 2}, "backbone.frozen_stages=2: "),
        ({"name": "resnet", "layout": {"blocks": [1, 1]}}, r"backbone.layout.blocks=\[1, 1\]: "),
        ({"name": "tiny", "input_format": {"order": "rgb"}}, "backbone.input_format: missing key scale, mean, std"),
        (
            {"name": "tiny", "input_format": {"order": "rgb", "scale": 1.0, "mean": [0.0] * 3, "std": [0.0] * 3}},
            "backbone.input_format.std=0.0: must be above 0",
        ),
    ],
)
def test_invalid_backbone_is_a_user_error_that_names_the_argument(backbone, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        build_detector(backbone, 3, **SMALL)
