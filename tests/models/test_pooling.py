from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from cpm_rcnn.models.pooling import PyramidRoIAlign, pyramid_levels
from cpm_rcnn.models.structures import Rois
from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS, INCLUSIVE

COMPONENTS = Path(__file__).parents[1] / "reference/components.npz"
STRIDES = (4, 8, 16, 32)
# One box a level, and then some.
BOXES = [
    [3.0, 5, 60, 70],
    [10, 10, 160, 170],
    [0, 0, 300, 250],
    [5, 20, 500, 505],
    [100, 100, 101, 100.5],
    [7, 7, 240, 220],
]
IMAGES = [1, 0, 1, 0, 1, 0]


def pyramid(batch=2, channels=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, 512 // s, 512 // s, generator=generator).to(dtype) for s in STRIDES]


def rois():
    return Rois(torch.tensor(BOXES), torch.tensor(IMAGES))


def test_inclusive_levels_are_the_releases():
    components = np.load(COMPONENTS)
    levels = pyramid_levels(torch.from_numpy(components["proposals"]), 4, INCLUSIVE)
    assert levels.tolist() == components["fpn_levels"].tolist()


def test_level_rises_with_each_doubling_from_112_pixels_on():
    sides = torch.tensor([0.0, 1, 111, 112.5, 223, 224.5, 447, 448.5, 5000])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    assert pyramid_levels(boxes, 4, CONTINUOUS).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert pyramid_levels(boxes, 2, CONTINUOUS).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_inside_out_box_goes_to_some_level():
    boxes = torch.tensor([[5.0, 5, 2, 9], [5, 5, 2, 2], [300, 300, -300, -300]])
    assert pyramid_levels(boxes, 4, CONTINUOUS).tolist()[:2] == [0, 0]
    assert PyramidRoIAlign(7, STRIDES, CONTINUOUS)(pyramid(), Rois(boxes, torch.tensor([0, 1, 0]))).isfinite().all()


@pytest.mark.parametrize("pixels", CONVENTIONS.values(), ids=lambda pixels: pixels.name)
def test_each_roi_is_pooled_from_its_level_and_image_into_its_row(pixels):
    features = pyramid()
    pooled = PyramidRoIAlign(7, STRIDES, convention)(features, rois())
    levels = pyramid_levels(rois().boxes, 4, convention).tolist()
    assert set(levels) == {0, 1, 2, 3}
    for row, (box, image, level) in enumerate(zip(BOXES, IMAGES, levels)):
        feature, box = features[level][image : image + 1], torch.tensor([box], dtype=torch.float32)
        alone = roi_align(feature, [box], 7, 1 / STRIDES[level], 2, aligned=convention is CONTINUOUS)
        torch.testing.assert_close(pooled[row], alone[0])


def test_levels_beyond_the_strides_are_ignored():
    features = pyramid()
    pool = PyramidRoIAlign(7, STRIDES, CONTINUOUS)
    assert torch.equal(pool([*features, torch.full((2, 3, 8, 8), torch.nan)], rois()), pool(features, rois()))


def test_gradient_reaches_every_level_and_only_what_was_pooled():
    features = [feature.requires_grad_() for feature in pyramid()]
    PyramidRoIAlign(7, STRIDES, CONTINUOUS)(features, rois()).sum().backward()
    assert all(feature.grad.abs().sum() > 0 for feature in features)
    assert features[3].grad[1].abs().sum() == 0


def test_no_rois_pool_to_nothing_and_still_give_every_level_a_gradient():
    features = [feature.requires_grad_() for feature in pyramid()]
    none = Rois(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    pooled = PyramidRoIAlign(14, STRIDES, CONTINUOUS)(features, none)
    assert pooled.shape == (0, 3, 14, 14)
    pooled.sum().backward()
    assert all(feature.grad is not None and (feature.grad == 0).all() for feature in features)


def test_half_precision_features_are_pooled_at_full_coordinates_and_kept_in_their_dtype():
    pool = PyramidRoIAlign(7, STRIDES, CONTINUOUS)
    half = pyramid(dtype=torch.bfloat16)
    pooled = pool(half, rois())
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, pool([feature.float() for feature in half], rois()).bfloat16())


@pytest.mark.parametrize("pixels", [CONTINUOUS, INCLUSIVE], ids=lambda pixels: pixels.name)
@pytest.mark.parametrize("size", [7, 14])
def test_both_ways_of_pooling_agree_forward_and_backward_far_beyond_the_image_too(convention, size):
    torch.manual_seed(0)
    features = [torch.randn(2, 8, 64 // k, 96 // k, requires_grad=True) for k in (1, 2, 4, 8)]
    corner = torch.rand(300, 2) * 500 - 80
    # Some turned inside out, as early grid stages decode them.
    rois = Rois(torch.cat([corner, corner + torch.rand(300, 2) ** 2 * 600 - 5], dim=1), torch.randint(0, 2, (300,)))
    levels = pyramid_levels(rois.boxes, 4, convention)
    assert len(levels.unique()) == 4
    pool = PyramidRoIAlign(size, (4, 8, 16, 32), convention)
    one, other = pool._pool_levels(features, rois, levels), pool._pool_bags(features, rois, levels)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    gradient = torch.randn_like(one)
    for a, b in zip(torch.autograd.grad(one, features, gradient), torch.autograd.grad(other, features, gradient)):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
