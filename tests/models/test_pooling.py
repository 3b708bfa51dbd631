import pytest
import torch
from inputs import STRIDES, no_rois, random_pyramid
from torchvision.ops import roi_align

from cpm_rcnn.boxes import CONTINUOUS, INCLUSIVE
from cpm_rcnn.models.pooling import CellPyramid, PyramidRoIAlign, pooling_format, pyramid_levels
from cpm_rcnn.models.structures import Rois

# At least one box for each level.
BOXES = [
    [3.0, 5, 60, 70],
    [10, 10, 160, 170],
    [0, 0, 300, 250],
    [5, 20, 500, 505],
    [100, 100, 101, 100.5],
    [7, 7, 240, 220],
]
IMAGES = [1, 0, 1, 0, 1, 0]


def pyramid():
    return random_pyramid(channels=3, size=512)


@pytest.fixture
def rois():
    return Rois.of(torch.tensor(BOXES), torch.tensor(IMAGES))


def test_inclusive_levels_equal_those_of_the_release(components):
    levels = pyramid_levels(torch.from_numpy(components["proposals"]), 4, INCLUSIVE)
    assert levels.tolist() == components["fpn_levels"].tolist()


def test_level_increases_when_the_side_doubles_from_112_pixels():
    sides = torch.tensor([0.0, 1, 111, 112.5, 223, 224.5, 447, 448.5, 5000])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    assert pyramid_levels(boxes, 4, CONTINUOUS).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert pyramid_levels(boxes, 2, CONTINUOUS).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_inverted_boxes_are_pooled_to_finite_values():
    boxes = torch.tensor([[5.0, 5, 2, 9], [5, 5, 2, 2], [300, 300, -300, -300]])
    assert pyramid_levels(boxes, 4, CONTINUOUS).tolist()[:2] == [0, 0]
    assert PyramidRoIAlign(7, STRIDES, CONTINUOUS)(pyramid(), Rois.of(boxes, torch.tensor([0, 1, 0]))).isfinite().all()


def test_each_row_is_pooled_from_the_level_and_image_of_its_roi(rois, convention):
    features = pyramid()
    pooled = PyramidRoIAlign(7, STRIDES, convention)(features, rois)
    levels = pyramid_levels(rois.boxes, 4, convention).tolist()
    assert set(levels) == {0, 1, 2, 3}
    for row, (box, image, level) in enumerate(zip(BOXES, IMAGES, levels)):
        feature, box = features[level][image : image + 1], torch.tensor([box], dtype=torch.float32)
        alone = roi_align(feature, [box], 7, 1 / STRIDES[level], convention.sampling_ratio, convention.aligned)
        torch.testing.assert_close(pooled[row], alone[0])


def test_levels_beyond_the_strides_are_ignored(rois):
    features = pyramid()
    pool = PyramidRoIAlign(7, STRIDES, CONTINUOUS)
    assert torch.equal(pool([*features, torch.full((2, 3, 8, 8), torch.nan)], rois), pool(features, rois))


def test_gradient_reaches_every_level_but_only_pooled_images(rois):
    features = [feature.requires_grad_() for feature in pyramid()]
    PyramidRoIAlign(7, STRIDES, CONTINUOUS)(features, rois).sum().backward()
    assert all(feature.grad.abs().sum() > 0 for feature in features)
    assert features[3].grad[1].abs().sum() == 0


def test_without_rois_the_result_is_empty_but_every_level_gets_a_gradient():
    features = [feature.requires_grad_() for feature in pyramid()]
    pooled = PyramidRoIAlign(14, STRIDES, CONTINUOUS)(features, no_rois())
    assert pooled.shape == (0, 3, 14, 14)
    pooled.sum().backward()
    assert all(feature.grad is not None and (feature.grad == 0).all() for feature in features)


def test_half_precision_features_are_pooled_in_float32_and_keep_their_dtype(rois):
    pool = PyramidRoIAlign(7, STRIDES, CONTINUOUS)
    half = [feature.bfloat16() for feature in pyramid()]
    pooled = pool(half, rois)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, pool([feature.float() for feature in half], rois).bfloat16())


def test_poolings_of_one_converted_pyramid_equal_those_of_the_features(rois):
    features = [feature.requires_grad_() for feature in pyramid()]
    pools = [PyramidRoIAlign(size, STRIDES, CONTINUOUS) for size in (7, 14)]
    converted = pooling_format(features)
    shared, alone = [pool(converted, rois) for pool in pools], [pool(features, rois) for pool in pools]
    assert all(torch.equal(one, other) for one, other in zip(shared, alone))
    gradients = [torch.randn_like(pooled) for pooled in shared]
    for one, other in zip(*(torch.autograd.grad(pooled, features, gradients) for pooled in (shared, alone))):
        torch.testing.assert_close(one, other)


def test_implementation_that_does_not_count_the_rois_of_a_level_gives_the_same_result_and_gradient(rois, convention):
    features = [feature.requires_grad_() for feature in pyramid()]
    levels = pyramid_levels(rois.boxes, 4, convention)
    pool = PyramidRoIAlign(7, STRIDES, convention)
    one, other = pool._pool_levels(features, rois, levels), pool._pool_masked(features, rois, levels)
    assert torch.equal(one, other)
    gradient = torch.randn_like(one)
    for a, b in zip(torch.autograd.grad(one, features, gradient), torch.autograd.grad(other, features, gradient)):
        torch.testing.assert_close(a, b)


def test_boxes_that_are_not_finite_are_pooled_without_counting_the_rois_of_a_level(convention):
    boxes = torch.tensor([[torch.nan] * 4, [0, 0, torch.inf, torch.inf], BOXES[0]])
    rois = Rois.of(boxes, torch.tensor([0, 1, 1]))
    pool = PyramidRoIAlign(7, STRIDES, convention)
    levels = pyramid_levels(boxes, 4, convention)
    pooled = pool._pool_masked(pyramid(), rois, levels)
    assert pooled.isfinite().all()
    assert torch.equal(pooled[2:], pool._pool_levels(pyramid(), rois[2:], levels[2:]))


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("convention", [CONTINUOUS, INCLUSIVE], ids=lambda convention: convention.name)
def test_both_implementations_agree_forward_and_backward_even_far_outside_the_image(convention, size):
    torch.manual_seed(0)
    features = [torch.randn(2, 8, 64 // k, 96 // k, requires_grad=True) for k in (1, 2, 4, 8)]
    corner = torch.rand(300, 2) * 500 - 80
    # Some boxes are inverted, as early grid stages decode them.
    rois = Rois.of(torch.cat([corner, corner + torch.rand(300, 2) ** 2 * 600 - 5], dim=1), torch.randint(0, 2, (300,)))
    levels = pyramid_levels(rois.boxes, 4, convention)
    assert len(levels.unique()) == 4
    pool = PyramidRoIAlign(size, (4, 8, 16, 32), convention)
    one, other = pool._pool_levels(features, rois, levels), pool._pool_bags(CellPyramid(features), rois, levels)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    gradient = torch.randn_like(one)
    for a, b in zip(torch.autograd.grad(one, features, gradient), torch.autograd.grad(other, features, gradient)):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
