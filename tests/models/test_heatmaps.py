import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.models.heatmaps import decode_heatmaps, enlarge, grid_loss, grid_targets, sub_regions

RATIOS = (1.0, 0.5, 0.25)
stages = pytest.mark.parametrize(("stage", "ratio"), list(enumerate(RATIOS)))


@pytest.fixture(scope="module")
def pairs(components):
    return torch.from_numpy(components["proposals"]), torch.from_numpy(components["gt_boxes"])


def all_valid(heatmaps):
    return torch.ones(len(heatmaps), dtype=torch.bool)


def reference_targets(components, stage):
    bits = np.unpackbits(components[f"targets_stage{stage}"], count=60 * 9 * 28 * 28)
    return torch.from_numpy(bits.reshape(60, 9, 28, 28)).bool()


def reference_logits(components, stage):
    random = np.random.RandomState(int(components[f"heat_seed{stage}"][0]))
    return torch.from_numpy((random.standard_normal((60, 9, 28, 28)) * 2).astype(np.float32))


def test_sub_regions_equal_those_of_the_release(components):
    assert sub_regions().tolist() == components["sub_regions"].tolist()


@stages
def test_targets_equal_those_of_the_release_in_every_cell(components, pairs, stage, ratio):
    targets = grid_targets(*pairs, ratio)
    assert targets.dtype == torch.bool
    assert torch.equal(targets, reference_targets(components, stage))
    assert targets.sum((2, 3)).tolist() == components[f"targets_sum{stage}"].tolist()


@stages
def test_decoded_boxes_equal_those_of_the_release(components, pairs, stage, ratio):
    boxes = decode_heatmaps(reference_logits(components, stage), pairs[0], ratio)
    expected = torch.from_numpy(components[f"decoded_stage{stage}"])
    torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-3)


@stages
def test_loss_equals_that_of_the_release(components, stage, ratio):
    heatmaps, targets = reference_logits(components, stage), reference_targets(components, stage)
    term = grid_loss(heatmaps, targets, all_valid(heatmaps))
    assert (term.total / term.count).item() == pytest.approx(components[f"grid_loss{stage}"].item(), rel=1e-5)


def slow_targets(roi, box, ratio):
    """docs/method.md section 5, one cell at a time, in float32 like the coordinates of the heatmap."""
    real = np.float32
    (x1, y1, x2, y2), (bx1, by1, bx2, by2) = [[real(v) for v in b] for b in (roi, box)]
    left, top = x1 - real(ratio / 2) * (x2 - x1), y1 - real(ratio / 2) * (y2 - y1)
    width, height = real(1 + ratio) * (x2 - x1), real(1 + ratio) * (y2 - y1)
    target = np.zeros((9, 28, 28), dtype=bool)
    if width <= 3 or height <= 3:
        return target
    for j in range(9):
        column, row = j // 3, j % 3
        x = (bx1, (bx1 + bx2) / 2, bx2)[column]
        y = (by1, (by1 + by2) / 2, by2)[row]
        cx, cy = int((x - left) / width * 56), int((y - top) / height * 56)
        whole = np.zeros((56, 56), dtype=bool)
        for dx, dy in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
            if 0 <= cx + dx < 56 and 0 <= cy + dy < 56:
                whole[cy + dy, cx + dx] = True
        start_x, start_y = 14 * column, 14 * row
        target[j] = whole[start_y : start_y + 28, start_x : start_x + 28]
    return target


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), ratio=st.sampled_from(RATIOS))
def test_targets_equal_a_loop_over_cells_even_far_outside_the_map(seed, ratio):
    random = np.random.default_rng(seed)

    def boxes(largest):
        corner = random.uniform(-30, 60, (6, 2))
        return np.concatenate([corner, corner + random.uniform(0.5, largest, (6, 2))], axis=1).astype(np.float32)

    rois, objects = boxes(60), boxes(200)
    objects[:3] = rois[:3] + random.uniform(-6, 6, (3, 4))
    expected = np.stack([slow_targets(roi, box, ratio) for roi, box in zip(rois, objects)])
    assert np.array_equal(grid_targets(torch.from_numpy(rois), torch.from_numpy(objects), ratio).numpy(), expected)


def test_points_just_outside_the_map_are_truncated_toward_zero_and_mark_its_border():
    # 56 pixels that are not enlarged: one pixel per cell. x1 = -0.9 is in cell 0, x1 = -1.1 in cell -1.
    rois = torch.tensor([[0.0, 0, 56, 56]]).expand(3, 4)
    boxes = torch.tensor([[-0.9, 5, 40, 40], [-1.1, 5, 40, 40], [-2.1, 5, 40, 40]])
    top_left = grid_targets(rois, boxes, 0.0)[:, 0]
    assert top_left[0].nonzero().tolist() == [[4, 0], [5, 0], [5, 1], [6, 0]]
    assert top_left[1].nonzero().tolist() == [[5, 0]]
    assert top_left[2].sum() == 0


@pytest.mark.parametrize(
    ("side", "has_target"), [(1.0, False), (1.5, False), (1.51, True), (0.0, False), (-4.0, False)]
)
def test_roi_with_an_enlarged_side_of_at_most_three_pixels_has_no_target(side, has_target):
    for width, height in ((side, 40.0), (40.0, side)):
        rois = torch.tensor([[10.0, 10, 10 + width, 10 + height]])
        assert grid_targets(rois, rois, 1.0).any().item() is has_target


def test_points_are_ordered_by_column_and_then_by_row():
    # Each point marks the cell at its own position: further right in later columns, further down in later rows.
    roi = torch.tensor([[0.0, 0, 56, 112]])
    targets = grid_targets(roi, torch.tensor([[6.0, 20, 50, 92]]), 0.0)[0]
    for j, (x1, y1, _, _) in enumerate(sub_regions().tolist()):
        rows, columns = targets[j].nonzero(as_tuple=True)
        middle = (columns.float().mean().item() + x1, rows.float().mean().item() + y1)
        assert middle == ((6, 28, 50)[j // 3], (10, 28, 46)[j % 3])


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), ratio=st.sampled_from(RATIOS))
def test_box_marked_on_its_heatmaps_is_decoded_with_an_error_of_at_most_half_a_cell(seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    size = 8 + 200 * torch.rand(20, 2, generator=generator)
    corner = 300 * torch.rand(20, 2, generator=generator)
    rois = torch.cat([corner, corner + size], dim=1)
    # Corners and centers stay in the sub-regions of their points.
    boxes = rois + (torch.rand(20, 4, generator=generator) - 0.5) * 0.4 * ratio * size.repeat(1, 2)
    _, covered = enlarge(rois, ratio)
    center = torch.nn.functional.conv2d(
        grid_targets(rois, boxes, ratio).float().flatten(0, 1)[:, None],
        torch.tensor([[[[0.0, 1, 0], [1, 1, 1], [0, 1, 0]]]]),
        padding=1,
    )
    heatmaps = center.view(20, 9, 28, 28) * 4 - 10  # highest at the center of the marked cross
    decoded = decode_heatmaps(heatmaps, rois, ratio)
    cell = covered.repeat(1, 2) / 56
    assert ((decoded - boxes).abs() <= 0.501 * cell + 1e-3).all()


def test_each_side_is_the_mean_of_its_three_points_weighted_by_score():
    generator = torch.Generator().manual_seed(3)
    heatmaps = torch.randn(4, 9, 28, 28, generator=generator)
    rois = torch.tensor([[10.0, 20, 90, 60], [0, 0, 33, 77], [5.5, 4.5, 6.5, 9.5], [-20, -30, 400, 300]])
    for ratio in RATIOS:
        decoded = decode_heatmaps(heatmaps, rois, ratio)
        for r, (x1, y1, x2, y2) in enumerate(rois.tolist()):
            points = []
            for j in range(9):
                score = heatmaps[r, j].sigmoid().max().item()
                row, column = divmod(heatmaps[r, j].argmax().item(), 28)
                x = x1 - ratio * (x2 - x1) / 2 + (column + 14 * (j // 3) + 0.5) / 56 * (1 + ratio) * (x2 - x1)
                y = y1 - ratio * (y2 - y1) / 2 + (row + 14 * (j % 3) + 0.5) / 56 * (1 + ratio) * (y2 - y1)
                points.append((score, x, y))

            def mean(which, axis, points=points):
                return sum(points[j][0] * points[j][axis] for j in which) / sum(points[j][0] for j in which)

            expected = [mean((0, 1, 2), 1), mean((0, 3, 6), 2), mean((6, 7, 8), 1), mean((2, 5, 8), 2)]
            assert decoded[r].tolist() == pytest.approx(expected, abs=1e-3)


def test_decoding_ignores_the_centre_point():
    heatmaps = torch.randn(3, 9, 28, 28, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0.0, 0, 50, 60]]).expand(3, 4)
    other = heatmaps.clone()
    other[:, 4] = heatmaps[:, 4].flip(-1)
    assert torch.equal(decode_heatmaps(heatmaps, rois, 0.5), decode_heatmaps(other, rois, 0.5))


def test_constant_heatmaps_and_extreme_scores_are_decoded_to_finite_boxes():
    rois = torch.tensor([[0.0, 0, 50, 60]])
    for value in (0.0, -30.0, 50.0):
        box = decode_heatmaps(torch.full((1, 9, 28, 28), value), rois, 1.0)
        assert box.isfinite().all()
        # The argmax is the first cell of each sub-region.
        torch.testing.assert_close(box[0, :2], -0.5 * rois[0, 2:] + 0.5 / 56 * 2 * rois[0, 2:])


def test_half_precision_heatmaps_give_float32_boxes_and_losses():
    heatmaps = torch.randn(2, 9, 28, 28).bfloat16()
    rois = torch.tensor([[1000.25, 1000.25, 1100.5, 1100.5]]).expand(2, 4)
    boxes = decode_heatmaps(heatmaps, rois, 1.0)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, decode_heatmaps(heatmaps.float(), rois, 1.0))
    assert grid_loss(heatmaps, heatmaps > 0, all_valid(heatmaps)).total.dtype == torch.float32


def test_loss_is_zero_for_perfect_heatmaps_and_15_log_2_for_zero_logits():
    rois = torch.tensor([[0.0, 0, 50, 60]])
    targets = grid_targets(rois, rois + 2, 1.0)
    perfect = grid_loss(torch.where(targets, 40.0, -40.0), targets, all_valid(rois))
    assert (perfect.total / perfect.count).item() == pytest.approx(0, abs=1e-9)
    zero = grid_loss(torch.zeros(targets.shape), targets, all_valid(rois))
    assert (zero.total / zero.count).item() == pytest.approx(15 * np.log(2), rel=1e-5)


def test_without_rois_there_are_no_targets_or_boxes_and_the_loss_is_zero_with_a_gradient():
    none, heatmaps = torch.zeros(0, 4), torch.zeros(0, 9, 28, 28, requires_grad=True)
    targets = grid_targets(none, none, 1.0)
    assert targets.shape == (0, 9, 28, 28)
    assert decode_heatmaps(heatmaps, none, 1.0).shape == (0, 4)
    term = grid_loss(heatmaps, targets, all_valid(heatmaps))
    assert (term.total.item(), term.count) == (0, 0)
    term.total.backward()
    assert heatmaps.grad is not None


@pytest.mark.parametrize("ratio", RATIOS)
def test_enlarged_area_keeps_its_centre_and_grows_by_the_ratio(ratio):
    rois = torch.tensor([[10.0, 20, 50, 40]])
    corner, size = enlarge(rois, ratio)
    torch.testing.assert_close(corner + size / 2, torch.tensor([[30.0, 30]]))
    torch.testing.assert_close(size, torch.tensor([[40.0, 20]]) * (1 + ratio))


@pytest.mark.parametrize(("ratio", "reach"), [(1.0, 0.4), (0.5, 0.6), (0.25, 0.7)])
def test_objects_that_train_a_stage_have_targets_on_its_map(ratio, reach):
    # docs/method.md section 5 pairs IoU thresholds and mapping ratios for this reason. The boxes are shifted RoIs.
    rois = torch.tensor([[0.0, 0, 100, 100]])
    shift = torch.arange(0, 60.0)[:, None]
    boxes = rois + torch.cat([shift, 0 * shift, shift, 0 * shift], dim=1)
    boxes = boxes[CONTINUOUS.iou(boxes, rois) >= max(reach, 0.5)]
    targets = grid_targets(rois.expand(len(boxes), 4), boxes, ratio)
    if ratio == 1.0:
        assert (targets.sum((2, 3)) > 0).all()
    else:
        assert targets[:, (0, 1, 2)].flatten(1).any(dim=1).all()
