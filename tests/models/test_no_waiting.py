"""On an accelerator, a training step never waits for the device, and a test waits once, to select detections.

The device is emulated (``emulated_device.py``), so that every machine can run this. Without random choices, the results
must also equal those of the CPU, where rows that are not valid are dropped instead of being masked.
"""

from types import SimpleNamespace

import pytest
import torch
from inputs import make_target, random_image

from cpm_rcnn.errors import UserError
from cpm_rcnn.inference import Detector, MultiScaleSettings
from cpm_rcnn.inference.to_host import to_host
from cpm_rcnn.models import rpn
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.heads import classification, scoring
from cpm_rcnn.models.heads.grid_stage import GridStage
from cpm_rcnn.models.host import requirements_deferred
from cpm_rcnn.training.nonfinite import NonFiniteGuard
from cpm_rcnn.training.optimizer import build_optimizer
from cpm_rcnn.training.schedule import Schedule
from emulated_device import NAME, EmulatedDevice, move, on_device, on_host

SMALL = {
    "fpn_channels": 16,
    "mlp_channels": 16,
    "anchor_sizes": (16, 32, 64, 128, 256),
    "ignore_border_anchors": False,
    "proposals_train": 20,
    "proposals_test": 10,
    "score_threshold": 0.2,
    # More RoIs than there are, so that all are sampled.
    "samples": 400,
}
CPM = {"head": "cpm", "point_channels": 4, "grid_convs": 1}
CASES = {
    "cpm": CPM | {"max_grid_rois": 30},
    "cpm with fusion": CPM | {"fusion": True, "ism": False, "max_grid_rois": 30},
    "faster": {"head": "faster"},
    "cascade with ISM and RSM": {"head": "cascade", "ism": True, "rsm": True},
}
# Training details that the equality with the CPU leaves out, because they are random.
RANDOM_CASES = {
    "cpm of crowded images": CPM | {"max_grid_rois": 1, "samples": 16, "rsm": False},
    "cpm of the release": CPM | {"proposals_train_per": "batch", "ism_weights": "release", "loss_mean": "process"},
    "faster with ISM and RSM": {"head": "faster", "ism": True, "rsm": True, "samples": 16},
    "cpm with another convention": CPM | {"convention": "mmdetection", "ism": False},
}
IMAGES = [random_image(64, 96), random_image(64, 64, seed=1)]
TARGETS = [make_target((10, 20, 60, 60), (50, 10, 90, 40), labels=[1, 2]), make_target((5, 5, 40, 50), labels=[3])]


def make_detector(**options):
    """A detector whose large random weights give scores of all sizes."""
    torch.manual_seed(0)
    detector = build_detector("tiny", 3, **SMALL | options)
    for name, parameter in detector.named_parameters():
        if "predictor.weight" in name or "cls_logits.weight" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return detector


def device_inputs():
    targets = [{name: on_device(value) for name, value in target.items()} for target in TARGETS]
    return [on_device(image) for image in IMAGES], targets


def train(detector, images, targets):
    """A training step; the detached losses by name."""
    optimizer = build_optimizer(Schedule(), detector, len(images))
    losses = detector.train()(images, targets)
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def detect(detector, images):
    return detector.eval()(images, details=True)


@pytest.fixture
def nothing_is_random(monkeypatch):
    """The RPN samples all anchors."""
    monkeypatch.setattr(rpn, "_SAMPLES", 100_000)
    monkeypatch.setattr(rpn, "_POSITIVE_FRACTION", 1.0)


def total(waits):
    return sum(waits.values())


@pytest.mark.parametrize("convention", ["continuous", "inclusive"])
@pytest.mark.parametrize("case", CASES)
def test_no_wait_in_a_training_step_one_in_a_test_and_the_results_of_the_cpu(case, convention, nothing_is_random):
    options = CASES[case] | {"convention": convention}
    reference = make_detector(**options)
    expected_detections = detect(reference, IMAGES)
    expected_losses = train(reference, IMAGES, TARGETS)
    detector = make_detector(**options)
    with EmulatedDevice() as device:
        images, targets = device_inputs()
        move(detector)
        device.take_waits()
        detections = detect(detector, images)
        waits = device.take_waits()
        assert total(waits) == 1, waits
        assert list(waits) == [found for found in waits if found.startswith("models/host.py")]
        losses = train(detector, images, targets)
        assert not device.waits
    for name, loss in expected_losses.items():
        torch.testing.assert_close(on_host(losses[name]), loss, rtol=1e-4, atol=1e-5)
    for name, parameter in reference.named_parameters():
        found = on_host(detector.get_parameter(name))
        torch.testing.assert_close(found, parameter.detach(), rtol=1e-3, atol=1e-5, msg=name)
    for found, expected in zip(detections, expected_detections, strict=True):
        assert len(expected["scores"]) > 3
        assert found.keys() == expected.keys()
        for name, column in expected.items():
            torch.testing.assert_close(on_host(found[name]), column, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("convention", ["continuous", "inclusive"])
@pytest.mark.parametrize("case", CASES)
def test_under_autocast_no_wait_in_a_training_step_and_one_in_a_test(case, convention):
    detector = make_detector(**CASES[case] | {"convention": convention})
    with EmulatedDevice() as device, torch.autocast(NAME, dtype=torch.bfloat16):
        images, targets = device_inputs()
        move(detector)
        device.take_waits()
        losses = train(detector, images, targets)
        assert not device.waits
        detect(detector, images)
        assert total(device.waits) == 1, device.waits
    assert all(on_host(loss).isfinite() for loss in losses.values())


@pytest.mark.parametrize("case", RANDOM_CASES)
def test_no_wait_in_a_training_step_with_other_settings(case):
    detector = make_detector(**RANDOM_CASES[case])
    with EmulatedDevice() as device:
        images, targets = device_inputs()
        targets[1] = {name: value[:0] for name, value in targets[1].items()}  # an image without objects
        move(detector)
        device.take_waits()
        losses = train(detector, images, targets)
        assert not device.waits
    assert all(on_host(loss).isfinite() for loss in losses.values())
    assert all(on_host(parameter).isfinite().all() for parameter in detector.parameters())


@pytest.mark.parametrize("case", CASES)
def test_weights_that_are_not_finite_give_a_loss_that_is_not_finite_and_no_error_of_the_device(case):
    detector = make_detector(**CASES[case])
    next(detector.rpn.parameters()).detach().fill_(torch.nan)
    with EmulatedDevice() as device:
        images, targets = device_inputs()
        move(detector)
        device.take_waits()
        losses = train(detector, images, targets)
        assert not device.waits
    assert not on_host(losses["loss_rpn_box"]).isfinite()


def test_second_nms_and_more_candidates_than_expected_wait_once_more_each(monkeypatch):
    options = CPM | {"final_nms_iou": 0.3, "score_threshold": 0.05}
    expected = detect(make_detector(**options), IMAGES)
    detector = make_detector(**options)
    with EmulatedDevice() as device:
        images, _ = device_inputs()
        move(detector)
        device.take_waits()
        detect(detector, images)
        assert total(device.take_waits()) == 2
        monkeypatch.setattr(classification, "_CANDIDATES_PER_ROI", 0)
        monkeypatch.setattr(classification, "_MIN_CANDIDATES", 5)
        found = detect(detector, images)
        assert total(device.take_waits()) == 3
    for one, other in zip(found, expected, strict=True):
        assert len(other["scores"]) > 5
        torch.testing.assert_close(on_host(one["boxes"]), other["boxes"], rtol=1e-4, atol=1e-3)


def test_check_for_a_nonfinite_loss_waits_once_after_the_backward_pass(tmp_path):
    detector = make_detector(**CASES["faster"]).train()
    guard, trainer = NonFiniteGuard("raise", tmp_path), SimpleNamespace(world_size=1, accumulate_grad_batches=1)
    with EmulatedDevice() as device:
        batch = device_inputs()
        move(detector)
        device.take_waits()
        guard.on_train_batch_start(trainer, detector, batch, 0)
        loss = torch.stack(list(detector(*batch).values())).sum()
        guard.on_before_backward(trainer, detector, loss)
        loss.backward()
        assert not device.waits
        guard.on_after_backward(trainer, detector)
        (wait,) = device.waits
    assert wait.startswith("training/nonfinite.py:")


def test_detector_copies_the_detections_of_all_images_to_the_host_at_once():
    categories = [{"id": i, "name": str(i)} for i in range(3)]
    sizes = {"short_side": 64, "max_size": 96}
    several = MultiScaleSettings(scales=(1.0, 1.25), flip=False)
    expected = Detector(make_detector(**CASES["faster"]), categories, **sizes).detect(IMAGES, batch_size=2)
    model = make_detector(**CASES["faster"])
    with EmulatedDevice() as device:
        detector = Detector(move(model), categories, **sizes)
        device.take_waits()
        found = detector.detect(IMAGES, batch_size=2)
        assert total(device.take_waits()) == 2
        multi_scale = Detector(model, categories, **sizes, multi_scale=several)
        multi_scale.detect(IMAGES, batch_size=2)
        assert total(device.take_waits()) == 3  # one for each scale, and one to merge them
    for one, other in zip(found, expected, strict=True):
        assert len(other) > 3
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)


def test_output_that_is_not_finite_is_an_error_when_the_host_reads_next():
    detector = make_detector(**CPM)
    with EmulatedDevice():
        images, _ = device_inputs()
        move(detector)
        bias = detector.head.rsm.predictor.bias
        bias.detach().fill_(torch.nan)
        detect(detector, images)
        with pytest.raises(UserError, match=r"the model's head\.rsm: 1 of .* first is head\.rsm\.predictor\.bias"):
            detector.check_outputs()
        detector.check_outputs()
        detect(detector, images)
        with pytest.raises(UserError, match=r"the model's head\.rsm"):
            detect(detector, images)
        with pytest.raises(UserError, match=r"the model's head\.rsm"):  # noqa: SIM117
            with requirements_deferred():
                to_host(detect(detector, images))
        bias.detach().fill_(0.0)
        next(detector.backbone.parameters()).detach().fill_(torch.nan)
        with pytest.raises(UserError, match="the model's backbone"):
            detect(detector, images)


@pytest.mark.parametrize("call", ["item", "nonzero", "mask"])
def test_new_wait_in_a_head_is_found_with_its_line(call, monkeypatch):
    wait = {"item": lambda x: x.sum().item(), "nonzero": lambda x: x.nonzero(), "mask": lambda x: x[x > 0]}[call]
    decode, rescore = GridStage.decode, scoring.rescore
    monkeypatch.setattr(GridStage, "decode", lambda stage, *args: (wait(args[1].boxes), decode(stage, *args))[1])
    monkeypatch.setattr(scoring, "rescore", lambda *args: (wait(args[0]), rescore(*args))[1])
    detector = make_detector(**CPM)
    with EmulatedDevice() as device:
        images, targets = device_inputs()
        move(detector)
        device.take_waits()
        train(detector, images, targets)
        assert total(device.waits) == 2
        assert all(place.startswith("models/heads/refinement.py:") for place in device.take_waits())
        detect(detector, images)
        assert any(place.startswith("models/heads/scoring.py:") for place in device.waits)


def test_emulated_device_records_waits_and_refuses_to_mix_devices():
    values = torch.arange(6.0)
    waiting = {
        "tolist": lambda x: x.tolist(),
        "_local_scalar_dense": lambda x: bool(x.sum() > 3),
        "copy to the host": lambda x: x.cpu(),
        "copy from the host": lambda x: x.new_tensor([1.0, 2.0]),
        "nonzero": lambda x: x.nonzero(),
        "bincount": lambda x: x.long().bincount(),
        "index with a mask": lambda x: x[x > 2],
        "index with indices of the host": lambda x: x[torch.tensor([0, 1])],
    }
    with EmulatedDevice() as device:
        x = on_device(values)
        for name, wait in waiting.items():
            device.take_waits()
            wait(x)
            assert [place.partition(": ")[2] for place in device.waits] == [name]
        device.take_waits()
        torch.where(x > 2, x, 0.0)[torch.zeros(2, dtype=torch.int64, device=NAME)].sum()
        torch.tensor([1.0]).to(NAME, non_blocking=True)
        assert not device.waits
        with pytest.raises(RuntimeError, match="tensors on emulated and on cpu"):
            x + values
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
