from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS, DETECTRON2, INCLUSIVE, TORCHVISION

COMPONENTS = Path(__file__).parent / "reference/components.npz"
both = pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda convention: convention.name)


@pytest.fixture(scope="module")
def components():
    return {name: torch.from_numpy(array) for name, array in np.load(COMPONENTS).items()}


def random_boxes(count, seed=0, size=200.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * size / 2], dim=1)


def test_inclusive_iou_equals_the_release(components):
    iou = INCLUSIVE.iou(components["gt_boxes"][:, None], components["proposals"])
    torch.testing.assert_close(iou, components["iou"], rtol=0, atol=1e-6)


def test_inclusive_box_coder_equals_the_release(components):
    boxes, proposals = components["gt_boxes"], components["proposals"]
    torch.testing.assert_close(INCLUSIVE.encode(boxes, proposals), components["encoded"], rtol=0, atol=1e-5)
    decoded = INCLUSIVE.decode(components["deltas"], proposals)
    torch.testing.assert_close(decoded, components["decoded_deltas"], rtol=0, atol=1e-3)


def test_inclusive_anchors_equal_the_release(components):
    levels = [INCLUSIVE.cell_anchors(stride, 8 * stride, (0.5, 1.0, 2.0)) for stride in (4, 8, 16, 32, 64)]
    assert torch.equal(torch.stack(levels), components["cell_anchors"])


def test_continuous_iou_equals_torchvision():
    a, b = random_boxes(40), random_boxes(30, seed=1)
    torch.testing.assert_close(CONTINUOUS.iou(a[:, None], b), box_iou(a, b), rtol=0, atol=1e-6)


def test_continuous_box_coder_equals_torchvision():
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, anchors = random_boxes(30), random_boxes(30, seed=1)
    torch.testing.assert_close(CONTINUOUS.encode(boxes, anchors), coder.encode_single(boxes, anchors))
    deltas = torch.randn(30, 4, generator=torch.Generator().manual_seed(2)) * 3
    torch.testing.assert_close(CONTINUOUS.decode(deltas, anchors), coder.decode_single(deltas, anchors))


def test_continuous_anchors_equal_torchvision_but_are_centered_on_the_cell():
    ours = CONTINUOUS.cell_anchors(8, 32, (0.5, 1.0, 2.0))
    theirs = AnchorGenerator(((32,),), ((0.5, 1.0, 2.0),)).generate_anchors((32,), (0.5, 1.0, 2.0))
    # torchvision rounds its anchors to whole pixels and centers them on the corner of the cell.
    assert (ours - 4 - theirs).abs().max() <= 0.5
    center = (ours[:, :2] + ours[:, 2:]) / 2
    torch.testing.assert_close(center, torch.full((3, 2), 4.0))


@both
@settings(deadline=None)
@given(ratio=st.floats(0.25, 4), size=st.integers(1, 64))
def test_anchors_have_their_area_and_ratio(convention, ratio, size):
    stride = 16
    anchor = convention.cell_anchors(stride, float(size * stride), [ratio])
    width, height = (side.item() for side in convention.sizes(anchor))
    # The release rounds the shape at the size of the cell: the error is at most half a cell, scaled. torchvision rounds
    # each coordinate.
    rounded = convention.anchors == "corner_rounded"
    slack = rounded + convention.extra * 0.5 * size * (1 + max(1, ratio)) + 1e-2
    assert width == pytest.approx(size * stride / ratio**0.5, abs=slack)
    assert height == pytest.approx(size * stride * ratio**0.5, abs=slack)


def test_inclusive_iou_counts_pixels():
    boxes = torch.tensor([[2, 3, 9, 9], [5, 1, 12, 6], [2, 3, 2, 3], [20, 20, 25, 22]])
    masks = torch.zeros(4, 30, 30, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist()):
        mask[y1 : y2 + 1, x1 : x2 + 1] = True
    shared = (masks[:, None] & masks).sum((2, 3))
    expected = shared / (masks[:, None] | masks).sum((2, 3))
    torch.testing.assert_close(INCLUSIVE.iou(boxes.float()[:, None], boxes.float()), expected)
    assert INCLUSIVE.area(boxes.float()).tolist() == masks.sum((1, 2)).tolist()


@both
def test_iou_is_symmetric_and_1_with_itself_and_between_0_and_1(convention):
    boxes = random_boxes(50)
    iou = convention.iou(boxes[:, None], boxes)
    assert torch.equal(iou, iou.T)
    assert (iou.diagonal() == 1).all()
    assert ((iou >= 0) & (iou <= 1)).all()


@both
@pytest.mark.parametrize(
    "bad",
    [[5, 5, 5, 5], [9, 5, 2, 8], [9, 9, 2, 2], [5, 9, 8, 2]],
    ids=["empty", "mirrored", "inside out", "upside down"],
)
def test_iou_of_degenerate_boxes_is_finite_and_never_a_match(convention, bad):
    box = torch.tensor([bad], dtype=torch.float32)
    others = torch.cat([random_boxes(20, size=12.0), torch.tensor([[0.0, 0, 10, 10]])])
    iou = convention.iou(box, others)
    assert iou.isfinite().all()
    assert ((iou >= 0) & (iou < 0.5)).all()


def test_iou_of_two_empty_boxes_is_zero():
    assert CONTINUOUS.iou(torch.full((1, 4), 3.0), torch.full((1, 4), 3.0)).item() == 0


def test_iou_does_not_modify_its_arguments():
    a, b = random_boxes(5), random_boxes(5, seed=1)
    kept = a.clone(), b.clone()
    CONTINUOUS.iou(a, b)
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])


@both
@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_decoding_undoes_encoding(convention, seed):
    boxes, anchors = random_boxes(10, seed), random_boxes(10, seed + 1)
    torch.testing.assert_close(convention.decode(convention.encode(boxes, anchors), anchors), boxes, rtol=0, atol=1e-2)


@both
def test_zero_deltas_keep_the_anchor_and_large_ones_stay_finite(convention):
    anchors = random_boxes(10)
    torch.testing.assert_close(convention.decode(torch.zeros(10, 4), anchors), anchors)
    decoded = convention.decode(torch.full((10, 4), 1e4), anchors)
    assert decoded.isfinite().all()
    # The cap is a factor of 1000 / 16.
    torch.testing.assert_close(
        convention.sizes(decoded)[0] / convention.sizes(anchors)[0], torch.full((10,), 62.5), rtol=1e-2, atol=0
    )


@both
def test_clip_moves_sides_inside_their_own_image_only(convention):
    sizes = torch.tensor([[30, 40], [50, 20]])
    boxes = torch.tensor([[[-5.0, -6, 100, 100], [3, 4, 5, 6]], [[-5.0, -6, 100, 100], [60, 70, 80, 90]]])
    clipped = convention.clip(boxes, sizes[:, None])
    extra = convention.extra
    expected = [
        [[0, 0, 40 - extra, 30 - extra], [3, 4, 5, 6]],
        [[0, 0, 20 - extra, 50 - extra], [20 - extra, 50 - extra, 20 - extra, 50 - extra]],
    ]
    assert torch.equal(clipped, torch.tensor(expected))
    assert torch.equal(convention.clip(clipped, sizes[:, None]), clipped)


@both
def test_xywh_and_back_is_the_same_box(convention):
    xywh = torch.tensor([[3.0, 4, 10, 20], [0, 0, 1, 1]])
    boxes = convention.from_xywh(xywh)
    assert boxes.tolist() == [
        [3, 4, 13 - convention.extra, 24 - convention.extra],
        [0, 0, 1 - convention.extra, 1 - convention.extra],
    ]
    assert torch.equal(convention.to_xywh(boxes), xywh)
    assert torch.equal(torch.stack(convention.sizes(boxes), dim=1), xywh[:, 2:])


@both
def test_two_flips_cancel_and_the_box_of_the_whole_image_does_not_change(convention):
    boxes = random_boxes(10).round()
    flipped = convention.flip(boxes, 300)
    assert (flipped[:, 2] > flipped[:, 0]).all()
    assert torch.equal(convention.flip(flipped, 300), boxes)
    whole = convention.from_xywh(torch.tensor([[0.0, 0, 300, 200]]))
    assert torch.equal(convention.flip(whole, 300), whole)


@both
def test_dtype_is_kept(convention):
    boxes = random_boxes(3).double()
    for result in (
        convention.iou(boxes, boxes),
        convention.clip(boxes, torch.tensor([10, 10])),
        convention.encode(boxes, boxes),
        convention.decode(boxes, boxes),
        convention.flip(boxes, 10),
        convention.to_xywh(boxes),
        convention.from_xywh(boxes),
    ):
        assert result.dtype == torch.float64


@both
def test_empty_inputs_give_empty_results(convention):
    none = torch.zeros(0, 4)
    assert convention.iou(none[:, None], random_boxes(3)).shape == (0, 3)
    assert convention.decode(none, none).shape == (0, 4)
    assert convention.clip(none, torch.tensor([4, 4])).shape == (0, 4)


def test_boxes_that_end_before_they_begin_are_inverted():
    boxes = torch.tensor([[5.0, 5, 9, 9], [5, 5, 5, 5], [9, 5, 5, 9], [5, 50, 9, 5]])
    assert CONTINUOUS.inverted(boxes).tolist() == [False, False, True, True]
    # Half a pixel wide, and enlarged eight times.
    narrow = INCLUSIVE.from_xywh(torch.tensor([10.0, 10, 0.5, 20])) * 8
    assert INCLUSIVE.inverted(torch.cat([boxes, narrow[None]])).tolist() == [False, False, False, True, False]


def test_roi_align_and_padding_of_each_convention():
    values = {name: (c.aligned, c.sampling_ratio, c.pads_raw) for name, c in CONVENTIONS.items()}
    assert values == {
        "continuous": (True, 2, False),
        "inclusive": (False, 2, True),
        "detectron2": (True, 0, False),
        "mmdetection": (True, 0, False),
        "torchvision": (False, 2, False),
    }


def test_anchors_of_torchvision_are_those_of_its_anchor_generator():
    generator = AnchorGenerator(((32.0,), (512.0,)), ((0.5, 1.0, 2.0),) * 2)
    for k, (stride, size) in enumerate(((4, 32), (64, 512))):
        assert torch.equal(TORCHVISION.cell_anchors(stride, size, (0.5, 1.0, 2.0)), generator.cell_anchors[k])


def test_anchors_of_detectron2_are_centered_on_the_corner_of_the_cell():
    anchors = DETECTRON2.cell_anchors(16, 64, (0.5, 1.0, 2.0))
    root = 2**0.5
    expected = [[-32 * root, -16 * root], [-32, -32], [-16 * root, -32 * root]]
    torch.testing.assert_close(anchors, torch.tensor([[x, y, -x, -y] for x, y in expected]))


def test_anchor_steps_of_torchvision_depend_on_the_padded_image():
    # P5 has 7 rows and P6 has 4; torchvision divides 224 by 4.
    assert TORCHVISION.anchor_steps(64, (4, 5), (224, 320)) == (56, 64)
    assert DETECTRON2.anchor_steps(64, (4, 5), (224, 320)) == (64, 64)
