import itertools

import pytest
import torch
import torch.distributed as dist
from inputs import make_target, random_image

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.errors import UserError
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.heads.cpm import CMM_STAGES
from cpm_rcnn.models.heads.grid_stage import GridStage

SMALL = {
    "fpn_channels": 16,
    "mlp_channels": 32,
    "point_channels": 8,
    "grid_convs": 2,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "ignore_border_anchors": False,
    "proposals_train": 8,
    "proposals_test": 8,
    "samples": 64,
}
LOSS_NAMES = {
    "loss_rpn_objectness",
    "loss_rpn_box",
    "loss_cls",
    "loss_grid0",
    "loss_grid1",
    "loss_grid2",
    "loss_ism",
    "loss_rsm",
}


def make_detector(seed=0, **arguments):
    torch.manual_seed(seed)
    return build_detector("tiny", 2, **SMALL | arguments)


def make_noisy_detector(**arguments):
    """A detector whose large random weights give many detections with distinct scores."""
    detector = make_detector(**{"proposals_test": 40, "score_threshold": 0.05} | arguments).eval()
    for name, parameter in detector.named_parameters():
        if "predictor.weight" in name or "cls_logits.weight" in name or ("deconvs" in name and parameter.ndim == 4):
            torch.nn.init.normal_(parameter, std=0.3)
    if detector.head.ism is not None:
        detector.head.ism.predictor.bias.data.fill_(0.5)
    return detector


def two_objects():
    """An image with a red and a blue rectangle."""
    image = torch.full((3, 64, 64), 40, dtype=torch.uint8)
    image[0, 6:40, 4:34] = 230
    image[2, 22:58, 36:60] = 230
    return image, make_target([4, 6, 34, 40], [36, 22, 60, 58])


@pytest.mark.parametrize(("loss_mean", "factor"), [("run", 0.5), ("process", 1.0)])
def test_losses_are_means_over_the_run_or_the_process(monkeypatch, loss_mean, factor):
    image, target = two_objects()
    detector = make_detector(loss_mean=loss_mean).train()
    torch.manual_seed(1)
    alone = detector([image], [target])
    # Another process with three times the RoIs: the mean count is twice this process's.
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda counts: counts.mul_(4))
    torch.manual_seed(1)
    for name, loss in detector([image], [target]).items():
        torch.testing.assert_close(loss, factor * alone[name])


def no_objects(height=64, width=64):
    return torch.full((3, height, width), 90, dtype=torch.uint8), make_target()


def backward(detector, *samples):
    images, targets = zip(*samples)
    losses = detector(images, targets)
    sum(losses.values()).backward()
    return losses


def assert_all_have_gradients(detector):
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def switches(*combinations):
    ids = ["+".join(name for name, on in zip(("cmm", "ism", "rsm"), parts) if on) or "none" for parts in combinations]
    return pytest.mark.parametrize(("cmm", "ism", "rsm"), combinations, ids=ids)


@switches(*itertools.product((True, False), repeat=3))
def test_every_combination_of_parts_has_its_losses_and_detects(cmm, ism, rsm):
    detector = make_noisy_detector(stages=CMM_STAGES if cmm else CMM_STAGES[:1], ism=ism, rsm=rsm)
    losses = backward(detector.train(), two_objects())
    absent = {"loss_grid1", "loss_grid2"} if not cmm else set()
    absent |= {"loss_ism"} if not ism else set()
    absent |= {"loss_rsm"} if not rsm else set()
    assert set(losses) == LOSS_NAMES - absent
    assert_all_have_gradients(detector)
    with torch.no_grad():
        [found] = detector.eval()([random_image(64, 64)])
    assert len(found["scores"]) > 0
    assert found["boxes"].isfinite().all()


# Together these cover all four on/off combinations of each pair of parts.
@switches((True, True, True), (True, False, False), (False, True, False), (False, False, True))
def test_training_on_one_image_reduces_the_losses_and_detects_its_objects(cmm, ism, rsm):
    # With 16 channels, all of the RPN's ReLUs may die where the objects are.
    detector = make_detector(stages=CMM_STAGES if cmm else CMM_STAGES[:1], ism=ism, rsm=rsm, fpn_channels=48)
    image, target = two_objects()
    history = []
    # At the end only the head is trained, on proposals that no longer change. Otherwise a proposal could cross IoU 0.5
    # and change its label when the learning rate is too low to adapt; with ten RoIs, one is a large part of the loss.
    for part, steps in ((detector, 100), (detector.head, 60)):
        detector.requires_grad_(False)
        part.requires_grad_(True)
        optimizer = torch.optim.Adam(part.parameters(), fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
        for _ in range(steps):
            losses = detector([image], [target])
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            history.append({name: loss.item() for name, loss in losses.items()})
    first, last = history[0], history[-1]
    assert sum(last.values()) < 0.1 * sum(first.values())
    # With 5 of 784 cells positive, heatmaps are learned slowly; all other losses become almost zero.
    grid = [name for name in last if "grid" in name]
    assert all(last[name] < 0.35 * first[name] for name in grid)
    assert sum(last[name] for name in set(last) - set(grid)) < 0.02 * sum(first[name] for name in set(last) - set(grid))

    with torch.no_grad():
        [found] = detector.eval()([image])
    scores, order = found["scores"], found["labels"][:2].argsort()
    assert found["labels"][order].tolist() == [1, 2]
    assert (CONTINUOUS.iou(found["boxes"][order], target["boxes"]) > 0.75).all()
    assert scores[1] > 0.3
    assert (scores[2:] < 0.5 * scores[1]).all()


def test_losses_are_positive_scalars_with_a_gradient_for_every_parameter():
    detector = make_detector(fusion=True)
    losses = backward(detector, two_objects())
    assert set(losses) == LOSS_NAMES
    for loss in losses.values():
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        assert loss > 0
    assert_all_have_gradients(detector)


@pytest.mark.parametrize("fusion", [False, True], ids=["plain", "fusion"])
@pytest.mark.parametrize("others", [0, 1], ids=["alone", "mixed"])
def test_every_parameter_gets_a_gradient_from_images_without_objects(others, fusion):
    detector = make_detector(fusion=fusion)
    losses = backward(detector, *[no_objects()] * 2, *[two_objects()] * others)
    assert all(loss.isfinite() for loss in losses.values())
    assert_all_have_gradients(detector)
    if not others:
        assert losses["loss_grid0"] == losses["loss_grid2"] == losses["loss_ism"] == losses["loss_rpn_box"] == 0


def test_losses_of_several_images_are_means_and_not_sums():
    detector = make_detector(samples=10_000, proposals_train=4)
    with torch.no_grad():
        one = detector(*zip(two_objects()))
        four = detector(*zip(*[two_objects()] * 4))
    for name in ("loss_cls", "loss_grid0", "loss_rpn_objectness"):
        torch.testing.assert_close(one[name], four[name], rtol=0.02, atol=0)


def test_detections_are_one_dict_per_image_sorted_by_score(convention):
    detector = make_noisy_detector(convention=convention.name)
    with torch.no_grad():
        detections = detector([random_image(64, 96), random_image(50, 40, 1), random_image(33, 65, 2)])
    assert len(detections) == 3
    assert sum(len(found["scores"]) for found in detections) > 10
    for found in detections:
        count = len(found["scores"])
        assert set(found) == {"boxes", "scores", "labels"}
        assert (found["boxes"].shape, found["boxes"].dtype) == ((count, 4), torch.float32)
        assert (found["scores"].shape, found["scores"].dtype) == ((count,), torch.float32)
        assert (found["labels"].shape, found["labels"].dtype) == ((count,), torch.int64)
        assert torch.equal(found["scores"], found["scores"].sort(descending=True).values)
        assert ((found["scores"] >= 0) & (found["scores"] <= 1)).all()
        assert set(found["labels"].tolist()) <= {1, 2}


def test_images_without_detections_give_empty_tensors():
    detector = make_detector(score_threshold=1.0).eval()
    for found in detector([random_image(64, 64), random_image(32, 32)]):
        assert (found["boxes"].shape, found["scores"].shape, found["labels"].shape) == ((0, 4), (0,), (0,))
        assert (found["boxes"].dtype, found["labels"].dtype) == (torch.float32, torch.int64)


def test_empty_list_of_images_is_refused():
    with pytest.raises(UserError, match="images is empty"):
        make_detector().eval()([])


@pytest.mark.parametrize(
    "options",
    [{}, {"ism": False, "rsm": False}, {"fusion": True, "stages": CMM_STAGES[:1]}],
    ids=["all", "cmm", "fused"],
)
def test_detections_of_an_image_do_not_depend_on_the_rest_of_the_batch(options):
    detector = make_noisy_detector(**options)
    image, other, dark = random_image(64, 60), random_image(50, 64, 1), no_objects(64, 64)[0]
    with torch.no_grad():
        [alone] = detector([image])
        for batch, position in (([image, other], 0), ([other, image], 1), ([dark, other, image], 2)):
            found = detector(batch)[position]
            assert torch.equal(found["labels"], alone["labels"])
            torch.testing.assert_close(found["boxes"], alone["boxes"], rtol=0, atol=1e-2)
            torch.testing.assert_close(found["scores"], alone["scores"], rtol=0, atol=1e-4)
    assert len(alone["labels"]) > 3


def test_detection_is_deterministic_and_changes_neither_model_nor_image():
    detector, image = make_noisy_detector(), random_image(64, 64)
    original, state = image.clone(), {k: v.clone() for k, v in detector.state_dict().items()}
    with torch.no_grad():
        first, second = detector([image])[0], detector([image])[0]
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(image, original)
    assert all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())


def test_training_does_not_modify_the_targets():
    image, target = two_objects()
    original = {key: value.clone() for key, value in target.items()}
    make_detector()([image], [target])
    assert all(torch.equal(target[key], original[key]) for key in original)


def test_same_seed_gives_the_same_losses():
    first, second = (make_detector()(*zip(two_objects())) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
    ],
    ids=["float", "one channel", "two dimensions", "channels last"],
)
def test_invalid_image_is_named_by_its_index(image):
    detector = make_detector().eval()
    with pytest.raises(UserError, match=r"images\[1\].*uint8"):
        detector([no_objects()[0], image])


@pytest.mark.parametrize("targets", [None, [], [two_objects()[1]] * 2])
def test_training_requires_one_target_per_image(targets):
    with pytest.raises(UserError, match="one target for each of the 1 images"):
        make_detector()([two_objects()[0]], targets)


def test_losses_and_boxes_are_float32_under_autocast_to_bfloat16():
    detector = make_detector(fusion=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = backward(detector, two_objects(), no_objects())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert_all_have_gradients(detector)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        [found] = make_noisy_detector()([random_image(64, 64)])
    assert len(found["boxes"]) > 0
    assert (found["boxes"].dtype, found["scores"].dtype) == (torch.float32, torch.float32)


def test_losses_under_autocast_are_close_to_those_in_float32():
    exact = make_detector()([two_objects()[0]], [two_objects()[1]])
    detector = make_detector()
    with torch.autocast("cpu", torch.bfloat16):
        near = detector([two_objects()[0]], [two_objects()[1]])
    for name in ("loss_cls", "loss_rpn_objectness", "loss_grid0"):
        torch.testing.assert_close(near[name], exact[name], rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_can_be_converted_to_another_dtype(dtype):
    detector = make_detector(fusion=True).to(dtype)
    losses = backward(detector, two_objects(), no_objects())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert_all_have_gradients(detector)
    with torch.no_grad():
        [found] = make_noisy_detector().to(dtype)([random_image(64, 64)])
    assert found["boxes"].dtype == torch.float32
    assert found["scores"].isfinite().all()


def test_detector_with_the_state_of_another_gives_the_same_detections():
    detector, other = make_noisy_detector(), make_detector(seed=1, proposals_test=40, score_threshold=0.05).eval()
    other.load_state_dict(detector.state_dict())
    image = random_image(64, 64)
    with torch.no_grad():
        [expected], [found] = detector([image]), other([image])
    assert len(expected["scores"]) > 0
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_grid_stages_run_only_on_boxes_that_remain_after_classification_at_test(monkeypatch):
    counts, forward = [], GridStage.forward
    monkeypatch.setattr(
        GridStage,
        "forward",
        lambda self, features, rois: counts.append(len(rois)) or forward(self, features, rois),
    )
    with torch.no_grad():
        [found] = make_noisy_detector()([random_image(64, 64)])
    assert counts == [len(found["scores"])] * 3


PARTS = [
    ("backbone.body", "backbone"),
    ("backbone.fpn", "backbone"),
    ("rpn.head.cls_logits", "rpn"),
    ("head.classifier.predictor", "head.classifier"),
    ("head.stages.0.convs.0", "head.stages.0"),
    ("head.stages.1.deconvs", "head.stages.1"),
    ("head.stages.2.convs.0", "head.stages.2"),
    ("head.ism.predictor", "head.ism"),
    ("head.rsm.mlp", "head.rsm"),
]


@pytest.mark.parametrize(("weights", "part"), PARTS)
def test_detection_with_weights_that_are_not_finite_names_the_first_part(weights, part):
    detector = make_noisy_detector()
    name, parameter = next(item for item in detector.named_parameters() if item[0].startswith(weights))
    parameter.data.fill_(float("nan"))
    with pytest.raises(UserError, match=rf"^the model's {part}: 1 of \d+ tensors have NaN .* first is {name};"):
        detector([random_image(64, 64)])


@pytest.mark.parametrize("part", ["backbone", "rpn", "head.classifier", "head.rsm"])
def test_detection_whose_values_overflow_names_the_first_part(part):
    detector = make_noisy_detector()
    for parameter in detector.get_submodule(part).parameters():
        parameter.data.abs_().add_(1e-3).mul_(1e30)
    with pytest.raises(UserError, match=rf"^the model's {part} gives NaN or infinite values although its weights are"):
        detector([random_image(64, 64)])


def target_with(**entries):
    return two_objects()[1] | entries


NAN, INF = float("nan"), float("inf")
INVALID_TARGETS = [
    (target_with(labels=torch.tensor([1, 0])), r'\["labels"\]\[1\] is 0: must be 1 to 2; 0 is background'),
    (target_with(labels=torch.tensor([3, 1])), r'\["labels"\]\[0\] is 3: must be 1 to 2'),
    (target_with(labels=torch.tensor([-1, 1])), r'\["labels"\]\[0\] is -1: must be 1 to 2'),
    (target_with(labels=torch.tensor([1])), r" has 2 boxes and 1 labels"),
    (target_with(labels=torch.tensor([1.0, 2.0])), r'\["labels"\] is torch.float32 \(2,\): must be int64 \(N,\)'),
    (target_with(labels=torch.tensor([[1, 2]])), r'\["labels"\] is torch.int64 \(1, 2\): must be int64'),
    (target_with(labels=[1, 2]), r'\["labels"\] is a list: must be a tensor'),
    (
        target_with(boxes=torch.tensor([[1.0, 2, 3, 4], [1, 2, NAN, 4]])),
        r'\["boxes"\]\[1\] is \(1, 2, nan, 4\): .*finite',
    ),
    (
        target_with(boxes=torch.tensor([[1.0, 2, INF, 4], [1, 2, 3, 4]])),
        r'\["boxes"\]\[0\] is \(1, 2, inf, 4\): .*finite',
    ),
    (
        target_with(boxes=torch.tensor([[1.0, 2, 3, 4], [60, 2, 3, 4]])),
        r'\["boxes"\]\[1\] is \(60, 2, 3, 4\): .*x1 <= x2',
    ),
    (target_with(boxes=torch.zeros(2, 5)), r'\["boxes"\] is torch.float32 \(2, 5\): must be float32 \(N, 4\)'),
    (target_with(boxes=torch.zeros(4)), r'\["boxes"\] is torch.float32 \(4,\): must be float32 \(N, 4\)'),
    (target_with(boxes=torch.zeros(2, 4, dtype=torch.bool)), r'\["boxes"\] is torch.bool \(2, 4\): must be float32'),
    (target_with(boxes=torch.zeros(2, 4, device="meta")), r'\["boxes"\] is on meta, but the images are on cpu'),
    ({"boxes": torch.zeros(0, 4)}, r' has no "labels"'),
    ([1, 2], r' is a list: must be a dict with "boxes" and "labels"'),
]


@pytest.mark.parametrize(("target", "message"), INVALID_TARGETS, ids=range(len(INVALID_TARGETS)))
def test_invalid_target_is_named_with_its_entry(target, message):
    with pytest.raises(UserError, match=rf"^targets\[1\]{message}"):
        make_detector()([two_objects()[0]] * 2, [two_objects()[1], target])


def test_targets_of_other_dtypes_and_boxes_without_area_are_accepted():
    target = {"boxes": torch.tensor([[4, 6, 34, 40], [9, 9, 9, 9]]), "labels": torch.tensor([1, 2], dtype=torch.int32)}
    losses = make_detector()([two_objects()[0]], [target])
    assert all(loss.isfinite() for loss in losses.values())
