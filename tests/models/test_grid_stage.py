import pytest
import torch
from inputs import head_inputs, make_ground_truth, no_rois, random_pyramid
from torch import nn

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.models.heads.grid_stage import GridOutput, GridStage, PointFusion, StageSettings
from cpm_rcnn.models.heatmaps import grid_loss, grid_targets
from cpm_rcnn.models.structures import Match, Rois, match_rois


def layers_of(stage):
    return [layer for layer in stage.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]


def test_grid_rcnn_s_initialization_starts_with_scores_of_one_percent():
    torch.manual_seed(0)
    stage = GridStage(StageSettings(0.5, 1.0, 1.0), head_inputs(), point_channels=16, num_convs=2, fusion=False)
    *convs, first, last = layers_of(stage)
    for conv in convs:
        fan_out = conv.out_channels * 9
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert (conv.bias == 0).all()
    for deconv in (first, last):
        assert deconv.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert (first.bias == 0).all()
    torch.testing.assert_close(last.bias.sigmoid(), torch.full((9,), 0.01))


def test_pytorch_s_initialization_is_that_of_newly_constructed_layers():
    torch.manual_seed(0)
    settings = StageSettings(0.5, 1.0, 1.0)
    stage = GridStage(settings, head_inputs(), point_channels=16, num_convs=2, fusion=False, init="pytorch")
    torch.manual_seed(0)
    for layer in layers_of(stage):
        new = type(layer)(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, groups=layer.groups
        )
        assert torch.equal(layer.weight, new.weight)
        assert torch.equal(layer.bias, new.bias)
        assert layer.bias.any()


def make_stage(fusion=False, point_channels=4, num_convs=2, **settings):
    torch.manual_seed(0)
    settings = StageSettings(**{"positive_iou": 0.5, "mapping_ratio": 1.0, "loss_weight": 1.0} | settings)
    stage = GridStage(settings, head_inputs(), point_channels=point_channels, num_convs=num_convs, fusion=fusion)
    for deconv in (stage.deconvs[0], stage.deconvs[3]):
        nn.init.normal_(deconv.weight, std=0.3)  # the initial weights are too small to see a difference
    return stage


@pytest.fixture(scope="module")
def features():
    return random_pyramid()


@pytest.fixture(scope="module")
def rois():
    return Rois.of(torch.tensor([[5.0, 6, 50, 70], [20, 10, 90, 60], [40, 40, 100, 110]]), torch.tensor([0, 1, 1]))


def match_of(rois, boxes):
    """The match of ``rois`` with the objects ``boxes``, row by row."""
    return Match(CONTINUOUS.iou(rois.boxes, boxes), boxes, torch.ones(len(boxes), dtype=torch.int64))


@pytest.mark.parametrize("fusion", [False, True])
def test_output_has_7x7_features_and_28x28_heatmaps_per_point(features, rois, fusion):
    output = make_stage(fusion)(features, rois)
    assert output.features.shape == (3, 36, 7, 7)
    assert output.heatmaps.shape == (3, 9, 28, 28)
    assert (output.unfused_heatmaps is not None) == fusion


@pytest.mark.parametrize("fusion", [False, True])
def test_without_rois_there_are_no_heatmaps_but_every_parameter_gets_a_gradient(features, fusion):
    stage, none = make_stage(fusion), no_rois()
    output = stage(features, none)
    assert output.heatmaps.shape == (0, 9, 28, 28)
    assert stage.decode(output, none).boxes.shape == (0, 4)
    term = stage.losses(output, none, match_rois(none, make_ground_truth([]), CONTINUOUS))["grid"]
    assert (term.total.item(), term.count) == (0, 0)
    term.total.backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in stage.parameters())


def test_layers_are_those_of_the_spec():
    settings = StageSettings(0.5, 1.0, 1.0)
    stage = GridStage(settings, head_inputs(channels=256), point_channels=64, num_convs=8, fusion=False)
    convs = [layer for layer in stage.convs if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in stage.convs if isinstance(layer, nn.GroupNorm)]
    assert [conv.stride for conv in convs] == [(2, 2)] + [(1, 1)] * 7
    assert {conv.out_channels for conv in convs} == {576}
    assert all(conv.bias is not None for conv in convs)
    assert [norm.num_groups for norm in norms] == [36] * 8
    first, norm, _, last = stage.deconvs
    assert (first.groups, last.groups, norm.num_groups) == (9, 9, 9)
    assert (first.out_channels, last.out_channels) == (576, 9)
    assert torch.allclose(last.bias.sigmoid(), torch.tensor(0.01))


@pytest.mark.parametrize("point", range(9))
def test_heatmap_of_a_point_depends_only_on_the_channels_of_that_point(point):
    stage = make_stage()
    point_features = torch.randn(2, 36, 7, 7)
    other = point_features.clone()
    other[:, 4 * point : 4 * point + 4] += torch.randn(2, 4, 7, 7)
    changed = (stage.deconvs(other) - stage.deconvs(point_features)).abs().amax(dim=(0, 2, 3)) > 1e-5
    assert changed.nonzero().flatten().tolist() == [point]


def slow_fusion(fusion, point_features):
    """Two rounds of messages, one edge at a time; neighbors of a point in ascending order."""
    channels = point_features.shape[1] // 9
    points = list(point_features.split(channels, dim=1))
    neighbors = [[n for n in range(9) if abs(n // 3 - p // 3) + abs(n % 3 - p % 3) == 1] for p in range(9)]

    def passed(messages, senders):
        depthwise, pointwise = messages
        result, edge = [], 0
        for p in range(9):
            total = points[p]
            for n in neighbors[p]:
                own = slice(edge * channels, (edge + 1) * channels)
                x = nn.functional.conv2d(
                    senders[n], depthwise.weight[own], depthwise.bias[own], padding=2, groups=channels
                )
                total = total + nn.functional.conv2d(x, pointwise.weight[own], pointwise.bias[own])
                edge += 1
            result.append(total)
        return result

    first = passed(fusion.first_order, points)
    return torch.cat(passed(fusion.second_order, first), dim=1)


def test_fusion_equals_a_loop_over_edges_first_order_then_second_order():
    torch.manual_seed(0)
    fusion, point_features = PointFusion(4), torch.randn(3, 36, 7, 7)
    torch.testing.assert_close(fusion(point_features), slow_fusion(fusion, point_features), rtol=1e-4, atol=1e-5)


def test_fusion_reaches_points_at_most_two_edges_away():
    torch.manual_seed(0)
    fusion, point_features = PointFusion(4), torch.randn(1, 36, 7, 7)
    other = point_features.clone()
    other[:, :4] += 1  # top left
    change = (fusion(other) - fusion(point_features)).unflatten(1, (9, 4)).abs().amax(dim=(0, 2, 3, 4)) > 1e-6
    assert change.tolist() == [p // 3 + p % 3 <= 2 for p in range(9)]


def test_fused_heatmaps_are_decoded_and_both_heatmaps_are_trained(features, rois):
    stage = make_stage(fusion=True, loss_weight=0.5)
    output = stage(features, rois)
    torch.testing.assert_close(output.heatmaps, stage.deconvs(stage.fusion(output.features)))
    torch.testing.assert_close(output.unfused_heatmaps, stage.deconvs(output.features))
    match = match_of(rois, rois.boxes + 3)
    targets = grid_targets(rois.boxes, match.boxes, 1.0)
    fused, unfused = (grid_loss(x, targets, rois.valid) for x in (output.heatmaps, output.unfused_heatmaps))
    term = stage.losses(output, rois, match)["grid"]
    assert term.count == fused.count
    torch.testing.assert_close(term.total, 0.5 * (fused.total + unfused.total))


def test_unfused_heatmaps_are_not_computed_at_test(features, rois):
    assert make_stage(fusion=True).eval()(features, rois).unfused_heatmaps is None


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_decoded_boxes_lie_in_the_enlarged_roi_and_have_no_gradient(features, rois, ratio):
    stage = make_stage(mapping_ratio=ratio)
    decoded = stage.decode(stage(features, rois), rois)
    assert not decoded.boxes.requires_grad
    assert torch.equal(decoded.images, rois.images)
    size = (rois.boxes[:, 2:] - rois.boxes[:, :2]).repeat(1, 2) * ratio / 2
    assert (decoded.boxes >= rois.boxes[:, (0, 1, 0, 1)] - size).all()
    assert (decoded.boxes <= rois.boxes[:, (2, 3, 2, 3)] + size).all()


def test_loss_uses_the_mapping_ratio_and_weight_of_the_stage(rois):
    stage = make_stage(mapping_ratio=0.25, loss_weight=0.25)
    match = match_of(rois, rois.boxes + 2)
    heatmaps = torch.randn(3, 9, 28, 28)
    term = stage.losses(GridOutput(torch.zeros(0), heatmaps), rois, match)["grid"]
    expected = grid_loss(heatmaps, grid_targets(rois.boxes, match.boxes, 0.25), rois.valid)
    torch.testing.assert_close(term.total, 0.25 * expected.total)
