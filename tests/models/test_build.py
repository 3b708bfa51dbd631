import pytest
import torch

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.build import CMM_STAGES, build_detector
from cpm_rcnn.models.detector import CPMRCNN

SMALL = {"fpn_channels": 16, "mlp_channels": 16, "point_channels": 4, "grid_convs": 1}


def number_of_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_default_r50_has_the_releases_1539_million_parameters():
    with torch.device("meta"):
        detector = build_detector("resnet50", 80)
    # The release counts the frozen norms' affine weights and biases, which are buffers here.
    affine = [b.numel() for n, b in detector.backbone.named_buffers() if n.endswith((".weight", ".bias"))]
    assert number_of_parameters(detector) + sum(affine) == 153_888_590


@pytest.mark.parametrize(
    ("backbone", "millions"),
    [
        ("resnet101", 172.8),
        ({"name": "resnext101_64x4d", "deformable_stages": (3, 4, 5)}, 216.7),
        ({"name": "resnet50", "stride_in_1x1": True}, 153.8),
    ],
    ids=str,
)
def test_paper_s_backbones_build_without_memory(backbone, millions):
    with torch.device("meta"):
        detector = build_detector(backbone, 80)
    assert isinstance(detector, CPMRCNN)
    assert number_of_parameters(detector) / 1e6 == pytest.approx(millions, abs=0.06)
    assert {p.device.type for p in detector.parameters()} == {"meta"}


def test_switches_leave_out_what_they_name():
    def parts(**arguments):
        detector = build_detector("tiny", 3, **SMALL | arguments)
        return len(detector.head.stages), detector.head.ism is not None, detector.head.rsm is not None

    assert parts() == (3, True, True)
    assert parts(stages=CMM_STAGES[:1], ism=False, rsm=False) == (1, False, False)
    assert parts(ism=False) == (3, False, True)
    assert parts(rsm=False) == (3, True, False)


def test_stages_have_the_papers_thresholds_ratios_and_weights():
    detector = build_detector("tiny", 3, **SMALL)
    settings = [stage.settings for stage in detector.head.stages]
    assert [s.positive_iou for s in settings] == [0.5, 0.6, 0.7]
    assert [s.mapping_ratio for s in settings] == [1.0, 0.5, 0.25]
    assert [s.loss_weight for s in settings] == [1.0, 0.5, 0.25]
    weights = [stage.convs[0].weight for stage in detector.head.stages]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("pixels", ["continuous", "inclusive"])
def test_every_part_shares_the_pixel_convention(pixels):
    detector = build_detector("tiny", 3, convention=convention, **SMALL)
    conventions = {m.pixels.name for m in detector.modules() if hasattr(m, "pixels")}
    assert conventions == {pixels}


def test_pixel_format_comes_with_the_backbone_or_as_given():
    caffe = {"order": "bgr", "scale": 1.0, "mean": (102.9801, 115.9465, 122.7717), "std": (1.0, 1.0, 1.0)}
    backbone = {"name": "tiny", "pixel_format": caffe}
    detector = build_detector(backbone, 3, **SMALL)
    assert detector.pixel_format.flip_channels
    torch.testing.assert_close(detector.pixel_format.mean.flatten(), torch.tensor(caffe["mean"]))
    assert backbone == {"name": "tiny", "pixel_format": caffe}  # the caller's mapping is left alone
    usual = build_detector("tiny", 3, **SMALL).pixel_format
    torch.testing.assert_close(usual.mean.flatten(), 255 * torch.tensor([0.485, 0.456, 0.406]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", 0),
        ("num_classes", "many"),
        ("pixels", "half"),
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
    ],
)
def test_bad_argument_is_the_users_error_and_named(key, value):
    with pytest.raises(UserError, match=rf"detector\.{key}="):
        build_detector("tiny", **{"num_classes": 3} | {key: value})


@pytest.mark.parametrize(
    ("stages", "key"),
    [
        ([], "stages"),
        ([CMM_STAGES[0] | {"positive_iou": 1.2}], "positive_iou"),
        ([CMM_STAGES[0] | {"mapping_ratio": -1.0}], "mapping_ratio"),
        ([CMM_STAGES[0] | {"loss_weight": -1.0}], "loss_weight"),
    ],
)
def test_bad_stage_is_the_users_error_and_named(stages, key):
    with pytest.raises(UserError, match=rf"cmm\.stages.*{key}|cmm\.{key}="):
        build_detector("tiny", 3, stages=stages, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"num_classes": 2.5}, "num_classes"),
        ({"fpn_channels": 16.5}, "fpn_channels"),
        ({"proposals_test": 10.5}, "proposals_test"),
        ({"point_channels": "eight"}, "point_channels"),
        ({"anchor_sizes": (32, 64, 128, 256, -1)}, "anchor_sizes"),
        ({"stages": [{"positive_iou": 0.5}]}, "stages"),
        ({"stages": [CMM_STAGES[0] | {"iou": 0.5}]}, "stages"),
        ({"backbone": {"name": "tiny", "depth": 3}}, "depth"),
        ({"backbone": {"weights": None}}, "name"),
        ({"backbone": {"name": "tiny", "pixel_format": {"order": "rgb"}}}, "pixel_format"),
        (
            {
                "backbone": {
                    "name": "tiny",
                    "pixel_format": {"order": "rgb", "scale": 1.0, "mean": (0.0,) * 3, "std": (0.0,) * 3},
                }
            },
            "std",
        ),
    ],
)
def test_argument_of_the_wrong_kind_is_the_users_error_too(arguments, key):
    with pytest.raises(UserError, match=key):
        build_detector(**{"backbone": "tiny", "num_classes": 3} | SMALL | arguments)
