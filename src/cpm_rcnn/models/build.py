"""From plain arguments to a detector: what a checkpoint stores is what is given here."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import signature
from typing import Any

from cpm_rcnn.errors import UserError, check_choice, check_count, check_flag, check_keys, check_list, check_range
from cpm_rcnn.models.backbones.build import STRIDES, FPNBackbone, build_body, default_pixel_format
from cpm_rcnn.models.heads.cpm import CPMHead
from cpm_rcnn.models.detector import CPMRCNN
from cpm_rcnn.models.heads.grid_stage import StageSettings
from cpm_rcnn.models.preprocess import ImagePreprocessor
from cpm_rcnn.models.rpn import RegionProposalNetwork
from cpm_rcnn.boxes import CONVENTIONS

_PIXEL_FORMAT_KEYS = ("order", "scale", "mean", "std")

# CMM's cascade (spec section 5).
CMM_STAGES = (
    {"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0},
    {"positive_iou": 0.6, "mapping_ratio": 0.5, "loss_weight": 0.5},
    {"positive_iou": 0.7, "mapping_ratio": 0.25, "loss_weight": 0.25},
)


def build_detector(
    backbone: str | Mapping[str, Any] = "resnet50",
    num_classes: int = 80,
    *,
    stages: Sequence[Mapping[str, float]] = CMM_STAGES,
    ism: bool = True,
    rsm: bool = True,
    fusion: bool = False,
    convention: str = "continuous",
    fpn_channels: int = 256,
    mlp_channels: int = 1024,
    point_channels: int = 64,
    grid_convs: int = 8,
    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
    ignore_border_anchors: bool = True,
    proposals_train: int = 2000,
    proposals_test: int = 1000,
    samples: int = 512,
    max_grid_rois: int = 96,
    score_threshold: float = 0.03,
    nms_iou: float = 0.3,
    test_stages: int | None = None,
) -> CPMRCNN:
    """A CPM R-CNN; the defaults are the paper's.

    Args:
        backbone: a name (``tiny``, ``resnet18`` .. ``resnext101_64x4d``, or a timm model), or the arguments of
            :func:`~cpm_rcnn.models.backbones.build.build_body` with, optionally, ``pixel_format`` (order, scale, mean, std).
        num_classes: foreground classes C; labels are 1..C.
        stages: one mapping a grid stage with ``positive_iou``, ``mapping_ratio`` and ``loss_weight``; three are CMM,
            one is the Grid R-CNN baseline.
        ism: instance scoring.
        rsm: re-scoring.
        fusion: Grid R-CNN's feature fusion.
        pixels: ``continuous``, or ``inclusive`` as the released weights want (spec section 9).
        fpn_channels: channels of the pyramid.
        mlp_channels: width of the classifiers' FC layers.
        point_channels: channels of one grid point, a multiple of 4.
        grid_convs: 3x3 convolutions of a grid stage.
        anchor_sizes: anchor size of P2..P6 in pixels.
        ignore_border_anchors: anchors that cross the border teach nothing.
        proposals_train: proposals a level before and an image after NMS, in training.
        proposals_test: the same at test.
        samples: RoIs an image that train a classifier.
        max_grid_rois: RoIs an image that enter the first grid stage in training.
        score_threshold: 0..1, of the classification branch at test.
        nms_iou: 0..1, of the NMS before the grid stages.
        test_stages: how many of the stages run at test; None: all. With fewer, ISM, which reads the last one, is passed
            over.

    Raises:
        UserError: a value out of range, or a backbone that does not exist or whose weights do not fit.
    """
    check_count("detector.num_classes", num_classes)
    check_choice("detector.convention", convention, tuple(CONVENTIONS))
    for key, value in (
        ("fpn_channels", fpn_channels),
        ("mlp_channels", mlp_channels),
        ("grid_convs", grid_convs),
        ("proposals_train", proposals_train),
        ("proposals_test", proposals_test),
        ("samples", samples),
        ("max_grid_rois", max_grid_rois),
    ):
        check_count(f"detector.{key}", value)
    for key, value in (("ism", ism), ("rsm", rsm), ("fusion", fusion)):
        check_flag(f"detector.{key}", value)
    check_range("detector.score_threshold", score_threshold, 0, 1)
    check_range("detector.nms_iou", nms_iou, 0, 1)
    check_count("detector.point_channels", point_channels, 4)
    if point_channels % 4:
        raise UserError(f"detector.point_channels={point_channels}: must be a multiple of 4")
    check_list("detector.anchor_sizes", anchor_sizes)
    if len(anchor_sizes) != len(STRIDES):
        raise UserError(f"detector.anchor_sizes={list(anchor_sizes)}: must be {len(STRIDES)} sizes, one a level P2..P6")
    for size in anchor_sizes:
        check_range("detector.anchor_sizes", size, 1)
    check_list("cmm.stages", stages)
    if not stages:
        raise UserError("cmm.stages=[]: at least one grid stage is needed")
    if test_stages is not None:
        check_count("detector.test_stages", test_stages)
        if test_stages > len(stages):
            raise UserError(f"detector.test_stages={test_stages}: the model has {len(stages)} grid stages")

    body_arguments: dict[str, Any] = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    stage_keys = [field.name for field in fields(StageSettings)]
    for k, stage in enumerate(stages):
        if not isinstance(stage, Mapping):
            raise UserError(f"cmm.stages[{k}]={stage}: must be a mapping with {', '.join(stage_keys)}")
        check_keys(f"cmm.stages[{k}]", stage, stage_keys, stage_keys)
    check_keys("backbone", body_arguments, signature(build_body).parameters, ["name"])
    given_format = body_arguments.pop("pixel_format", None)
    if given_format:
        check_keys("backbone.pixel_format", given_format, _PIXEL_FORMAT_KEYS, _PIXEL_FORMAT_KEYS)
    body_format = given_format or default_pixel_format(body_arguments["name"])
    convention = CONVENTIONS[convention]
    pixel_format = ImagePreprocessor(**body_format, convention=convention)
    body = build_body(**body_arguments, pixel_format=body_format)
    return CPMRCNN(
        pixel_format,
        FPNBackbone(body, fpn_channels),
        RegionProposalNetwork(
            fpn_channels,
            STRIDES,
            anchor_sizes=anchor_sizes,
            ignore_border_anchors=ignore_border_anchors,
            proposals_train=proposals_train,
            proposals_test=proposals_test,
            convention=convention,
        ),
        CPMHead(
            fpn_channels,
            STRIDES[:4],
            num_classes,
            stages=[StageSettings(**stage) for stage in stages],
            ism=ism,
            rsm=rsm,
            fusion=fusion,
            mlp_channels=mlp_channels,
            point_channels=point_channels,
            grid_convs=grid_convs,
            samples=samples,
            max_grid_rois=max_grid_rois,
            score_threshold=score_threshold,
            nms_iou=nms_iou,
            test_stages=test_stages,
            convention=convention,
        ),
    )
