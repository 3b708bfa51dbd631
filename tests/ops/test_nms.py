"""The function nms_mask, its operator for torch.compile and torch.export, and its implementations without a kernel."""

import warnings

import pytest
import torch
import torchvision
from torch.export import export

from cpm_rcnn.models.nms import grouped_nms
from cpm_rcnn.ops import nms
from cpm_rcnn.ops.nms import nms_mask, nms_mask_reference
from ops import nms_sweep


def scene(count=200, groups=4, dtype=torch.float32):
    torch.manual_seed(0)
    corner = 50 * torch.rand(count, 2, dtype=dtype)
    boxes = torch.cat([corner, corner + 30 * torch.rand(count, 2, dtype=dtype)], 1)
    return boxes, torch.rand(count, dtype=dtype), torch.randint(groups, (count,)), 0.4


IMPLEMENTATIONS = {
    "nms_mask": nms_mask,
    "reference": lambda *case: nms_mask_reference(*case),
    "torchvision per group": lambda *case: nms._torchvision_mask(*case),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_random_cases_equal_torchvision_per_group(name):
    assert not nms_sweep.run(IMPLEMENTATIONS[name], range(100 if name == "reference" else 200), longest=150)


@pytest.mark.parametrize("count", [63, 64, 65, 200])
def test_the_reference_resolves_a_chain_in_which_each_box_would_suppress_the_next(count):
    """Two neighbors have IoU 0.5, so every other box is kept, and each decision depends on the one before."""
    left = torch.arange(count) / 3
    boxes = torch.stack([left, torch.zeros(count), left + 1, torch.ones(count)], 1)
    scores = -torch.arange(count).float()
    mask = nms_mask_reference(boxes, scores, torch.zeros(count, dtype=torch.int64), 0.45)
    assert torch.equal(mask, torch.arange(count) % 2 == 0)
    assert torch.equal(mask, nms_mask(boxes, scores, torch.zeros(count, dtype=torch.int64), 0.45))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_iou_equal_to_the_threshold_does_not_suppress(name):
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1]])
    arguments = (boxes, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64))
    assert IMPLEMENTATIONS[name](*arguments, 0.5, None).tolist() == [True, True]
    assert IMPLEMENTATIONS[name](*arguments, 0.4999, None).tolist() == [True, False]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_thresholds_are_compared_in_float64(name):
    """0.3 in float32 is more than 0.3, and 0.7 is less. The IoUs of these boxes are 3 / 10 and 7 / 10."""
    for height, threshold, kept in ((3, 0.3, False), (7, 0.7, True)):
        boxes = torch.tensor([[0.0, 0, 1, 10], [0, 0, 1, height]])
        arguments = (torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64), threshold, None)
        assert IMPLEMENTATIONS[name](boxes, *arguments).tolist() == [True, kept]
        assert IMPLEMENTATIONS[name](boxes.double(), *arguments).tolist() == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_last_bit_of_an_iou_is_that_of_torchvision(name, dtype):
    """Each threshold is the IoU of a pair. A fused multiply-add would change the last bit of many IoUs."""
    pairs = scene(300, dtype=dtype)[0].view(-1, 2, 4)
    pairs[:, 1] = pairs[:, 0] + pairs[:, 1] / 20
    for pair in pairs:
        iou = torchvision.ops.box_iou(pair[:1], pair[1:]).item()
        arguments = (pair, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64))
        assert torch.equal(IMPLEMENTATIONS[name](*arguments, iou, None), nms_sweep.expected_mask(*arguments, iou))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_of_equal_scores_the_first_row_is_kept(name):
    boxes = torch.tensor([[0.0, 0, 1, 1]]).expand(100, 4)
    scores = torch.tensor([0.0, -0.0]).repeat(50)
    mask = IMPLEMENTATIONS[name](boxes, scores, torch.arange(100) % 3, 0.5, None)
    assert mask.nonzero().flatten().tolist() == [0, 1, 2]


def test_rows_that_are_not_valid_are_not_kept_and_suppress_no_box():
    boxes, scores, groups, threshold = scene()
    valid = torch.arange(len(boxes)) % 3 > 0
    mask = nms_mask(boxes, scores, groups, threshold, valid)
    assert torch.equal(mask[valid], nms_mask(boxes[valid], scores[valid], groups[valid], threshold))
    assert not mask[~valid].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    boxes, scores, groups, threshold = scene()
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    mask = nms_mask(boxes, scores, groups, threshold)
    assert torch.equal(mask, nms_mask(boxes.float(), scores.float(), groups, threshold))


def test_boxes_may_require_gradients():
    boxes, scores, groups, threshold = scene()
    mask = nms_mask(boxes.requires_grad_(), scores.requires_grad_(), groups, threshold)
    assert not mask.requires_grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [0, 30])
def test_the_operator_passes_opcheck(count, masked):
    boxes, scores, groups, threshold = scene(count)
    torch.library.opcheck(nms.nms_mask_op, (boxes, scores, groups, threshold, groups > 0 if masked else None))


def test_it_compiles_and_exports_as_one_graph_for_any_number_of_boxes():
    boxes, scores, groups, threshold = scene()

    def function(boxes, scores, groups):
        return nms_mask(boxes, scores, groups, threshold, groups > 0)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, boxes, scores, groups):
            return function(boxes, scores, groups)

    rows = torch.export.Dim("rows", min=2)
    dynamic = {"boxes": {0: rows}, "scores": {0: rows}, "groups": {0: rows}}
    exported = export(Module(), (boxes, scores, groups), dynamic_shapes=dynamic).module()
    for count in (200, 57):
        given = (boxes[:count], scores[:count], groups[:count])
        assert torch.equal(compiled(*given), function(*given))
        assert torch.equal(exported(*given), function(*given))


def test_meta_tensors_give_the_shape_of_the_mask():
    boxes, scores, groups, threshold = scene()
    mask = nms_mask(boxes.to("meta"), scores.to("meta"), groups.to("meta"), threshold)
    assert (mask.shape, mask.dtype, mask.device.type) == ((200,), torch.bool, "meta")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda b, s, g: (b[:, :3], s, g), r"boxes is \(200, 3\): must be \(R, 4\)"),
        (lambda b, s, g: (b, s[1:], g), r"scores is \(199,\): must be \(200,\)"),
        (lambda b, s, g: (b, s, g[:, None]), r"groups is \(200, 1\): must be \(200,\)"),
        (lambda b, s, g: (b, s, g.int()), "groups is torch.int32: must be int64"),
        (lambda b, s, g: (b.long(), s, g), "boxes is torch.int64: must be a floating-point dtype"),
        (lambda b, s, g: (b, s, g, 0.5, g), "valid must be bool"),
        (lambda b, s, g: (b, s.to("meta"), g), "scores is on meta but boxes is on cpu"),
    ],
)
def test_invalid_arguments_raise_an_error(broken, message):
    boxes, scores, groups, threshold = scene()
    given = broken(boxes, scores, groups)
    with pytest.raises(RuntimeError, match=f"^nms_mask: {message}"):
        nms_mask(*given, *([threshold] if len(given) == 3 else []))


def test_a_missing_kernel_warns_once_and_uses_torchvision(request):
    expected = nms_mask(*scene())
    request.getfixturevalue("no_compiler")
    with pytest.warns(UserWarning, match="CPU kernels are missing"):
        assert torch.equal(nms_mask(*scene()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(nms_mask(*scene()), expected)


@pytest.mark.parametrize("count", [0, 1, 700, 1500])
def test_grouped_nms_gives_the_rows_of_batched_nms_in_float64_and_its_order(count):
    boxes, scores, groups, threshold = scene(count)
    scores = (20 * scores).round() / 20  # equal scores
    expected = torchvision.ops.batched_nms(boxes.double(), scores.double(), groups, threshold)
    rows, kept = grouped_nms(boxes, scores, groups, threshold, torch.ones(count, dtype=torch.bool))
    assert kept.all()
    # The boxes that are kept are the same, because both prefer the lower row of equal scores in a group.
    assert torch.equal(rows.sort().values, expected.sort().values)
    assert torch.equal(scores[rows], scores[expected])
