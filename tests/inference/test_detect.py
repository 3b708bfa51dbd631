"""Detector.detect: images in any form, batches, and results in pixels of the original images."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as F

from cpm_rcnn.errors import ArgumentError, UserError
from cpm_rcnn.inference import Detector, MultiScaleSettings
from cpm_rcnn.inference.multi_scale import MultiScaleDetector
from cpm_rcnn.models.build import build_detector
from cpm_rcnn.models.structures import DETAILS
from small_models import CATEGORIES, SMALL


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model = build_detector(num_classes=2, **SMALL).eval()
    # Initial weights give almost equal scores, and ISM multiplies them by almost 0.
    nn.init.normal_(model.head.classifier.predictor.weight, std=1.0)
    nn.init.constant_(model.head.ism.predictor.bias, 0.5)
    return Detector(model, CATEGORIES, short_side=64, max_size=96)


def random_image(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def as_array(image):
    return image.permute(1, 2, 0).numpy()


def same(a, b):
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "scores", "labels"))
    return tensors and a.names == b.names and len(a) > 0


IMAGE = random_image(50, 80)


@pytest.fixture
def expected(detector):
    (found,) = detector.detect([IMAGE])
    return found


FORMS = {
    "tensor": lambda folder: IMAGE,
    "array": lambda folder: as_array(IMAGE),
    "array in another memory order": lambda folder: np.asfortranarray(as_array(IMAGE)),
    "PIL image": lambda folder: Image.fromarray(as_array(IMAGE)),
    "PIL image with transparency": lambda folder: Image.fromarray(as_array(IMAGE)).convert("RGBA"),
    "path": lambda folder: save(folder),
    "path as a string": lambda folder: str(save(folder)),
}


def save(folder):
    Image.fromarray(as_array(IMAGE)).save(folder / "image.png")
    return folder / "image.png"


@pytest.mark.parametrize("form", FORMS)
def test_an_image_can_be_given_in_several_forms_in_a_list_or_alone(detector, expected, form, tmp_path):
    image = FORMS[form](tmp_path)
    (found,) = detector.detect([image])
    assert same(found, expected)
    (found,) = detector.detect(image)
    assert same(found, expected)


def test_gray_images_are_the_same_in_every_form(detector):
    gray = as_array(IMAGE)[:, :, 0]
    (expected,) = detector.detect([torch.from_numpy(gray).expand(3, -1, -1)])
    sixteen = Image.fromarray(gray.astype(np.uint16) * 256)
    for image in (gray, Image.fromarray(gray), sixteen):
        (found,) = detector.detect([image])
        assert same(found, expected)


def test_images_of_different_forms_and_sizes_have_one_result_each_in_order(detector, tmp_path):
    images = [save(tmp_path), random_image(60, 40), as_array(random_image(30, 90, seed=2))]
    found = detector.detect(images)
    assert len(found) == 3
    for image, result in zip(images, found):
        assert same(result, detector.detect([image])[0])


def test_a_generator_is_read_one_batch_at_a_time(detector, monkeypatch):
    read, batches, forward = [], [], detector.detect_resized

    def images():
        for seed in range(5):
            read.append(seed)
            yield random_image(50, 80, seed)

    def detect_resized(resized, sizes, **options):
        batches.append((len(resized), len(read)))
        return forward(resized, sizes, **options)

    monkeypatch.setattr(detector, "detect_resized", detect_resized)
    assert len(detector.detect(images(), batch_size=2)) == 5
    assert batches == [(2, 2), (2, 4), (1, 5)]
    assert detector.detect([]) == []


def test_progress_counts_the_images_that_are_done(detector):
    done = []
    detector.detect([random_image(40, 60)] * 5, batch_size=2, progress=done.append)
    assert done == [2, 4, 5]


def test_progress_moves_with_the_tiles_of_an_image(detector):
    tiled = Detector(detector.model, CATEGORIES, short_side=64, max_size=96, tile=64, tile_overlap=0.0)
    done = []
    tiled.detect([random_image(128, 128), random_image(64, 64)], progress=done.append)
    assert done == [0.25, 0.5, 0.75, 1, 1, 2, 2]


def test_results_are_those_of_the_resized_image_rescaled_by_hand(detector):
    image = random_image(90, 200)
    # The longer side would be 142 pixels, so it decides: 96 x 43.
    resized = F.resize(image, [43, 96], antialias=True)
    assert torch.equal(detector.resize(image), resized)
    with torch.inference_mode():
        (at_network_size,) = detector.model([resized])
        (by_hand,) = detector.detect_resized([resized], [(90, 200)])
    (found,) = detector.detect([image])
    x, y = 200 / 96, 90 / 43
    torch.testing.assert_close(found.boxes, at_network_size["boxes"] * torch.tensor([x, y, x, y]))
    assert torch.equal(found.boxes, by_hand["boxes"])
    assert torch.equal(found.scores, at_network_size["scores"])
    assert torch.equal(found.labels, at_network_size["labels"])


def test_images_of_the_same_size_have_the_same_results_in_batches_of_2_as_alone(detector):
    images = [random_image(50, 80, seed) for seed in range(4)]
    for one, two in zip(detector.detect(images), detector.detect(images, batch_size=2), strict=True):
        assert len(one) == len(two)
        torch.testing.assert_close(one.scores, two.scores, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.boxes, two.boxes, rtol=1e-4, atol=1e-3)
        assert torch.equal(one.labels, two.labels)


def test_detections_below_the_score_threshold_are_left_out(detector, expected):
    threshold = expected.scores.median().item()
    (found,) = detector.detect([IMAGE], score_threshold=threshold)
    kept = expected.scores >= threshold
    assert 0 < len(found) < len(expected)
    assert torch.equal(found.boxes, expected.boxes[kept])
    assert torch.equal(found.scores, expected.scores[kept])
    assert len(found.names) == len(found)
    (nothing,) = detector.detect([IMAGE], score_threshold=1)
    assert (len(nothing), nothing.boxes.shape, nothing.names) == (0, (0, 4), [])


def test_detections_are_sorted_and_names_match_labels(detector, expected):
    assert (expected.scores.diff() <= 0).all()
    assert expected.scores[0] > 2 * expected.scores[-1] > 0
    assert set(expected.labels.tolist()) == {1, 2}
    assert expected.names == [("cat", "dog")[label - 1] for label in expected.labels.tolist()]
    assert detector.class_names == ["cat", "dog"]


def test_results_are_ordinary_tensors_on_the_cpu(expected):
    assert expected.boxes.dtype == expected.scores.dtype == torch.float32
    assert expected.labels.dtype == torch.int64
    assert {value.device.type for value in expected.to_dict().values()} == {"cpu"}
    expected.boxes.add_(1)  # not possible with a tensor of inference mode
    assert list(expected.to_dict()) == ["boxes", "scores", "labels"]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored_also_after_an_error(detector, training, monkeypatch):
    detector = copy.deepcopy(detector)
    detector.model.train(training)
    assert len(detector.detect([IMAGE])) == 1
    assert detector.model.training is training
    monkeypatch.setattr(detector, "detect_resized", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        detector.detect([IMAGE])
    assert detector.model.training is training


def damaged_file(folder):
    (folder / "damaged.png").write_bytes(save(folder).read_bytes()[:200])
    return folder / "damaged.png"


INVALID = {
    "missing file": (lambda folder: folder / "none.png", r"^images\[1\]=.*none\.png: no such file"),
    "folder": (lambda folder: folder, r"^images\[1\]=.*: is a folder"),
    "damaged file": (damaged_file, r"^images\[1\]: .*damaged\.png is damaged"),
    "float array": (
        lambda folder: as_array(IMAGE) / 255,
        r"^images\[1\] is a float64 array \(50, 80, 3\): must be uint8",
    ),
    "float gray array": (lambda folder: np.zeros((5, 5)), r"^images\[1\] is a float64 array \(5, 5\): must be uint8"),
    "channels first": (lambda folder: IMAGE.numpy(), r"^images\[1\] is a uint8 array \(3, 50, 80\): must be"),
    "batch of arrays": (lambda folder: as_array(IMAGE)[None], r"^images\[1\] is a uint8 array \(1, 50, 80, 3\)"),
    "empty array": (lambda folder: np.zeros((0, 5, 3), np.uint8), r"^images\[1\] is a uint8 array \(0, 5, 3\)"),
    "empty gray array": (lambda folder: np.zeros((5, 0), np.uint8), r"^images\[1\] is a uint8 array \(5, 0\)"),
    "float tensor": (lambda folder: IMAGE / 255, r"^images\[1\] is torch\.float32 \(3, 50, 80\): must be torch\.uint8"),
    "batch of tensors": (lambda folder: IMAGE[None], r"^images\[1\] is torch\.uint8 \(1, 3, 50, 80\)"),
    "channels last": (lambda folder: IMAGE.permute(1, 2, 0), r"^images\[1\] is torch\.uint8 \(50, 80, 3\)"),
    "empty PIL image": (lambda folder: Image.new("RGB", (0, 5)), r"^images\[1\] is a PIL image without pixels"),
    "float PIL image": (lambda folder: Image.new("F", (5, 5)), r"^images\[1\] has 32 bits per channel"),
    "None": (lambda folder: None, r"^images\[1\] is a NoneType: must be a path, a PIL image"),
    "bytes": (lambda folder: b"PNG", r"^images\[1\] is a bytes: must be a path, a PIL image"),
}


@pytest.mark.parametrize("kind", INVALID)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_invalid_image_is_refused_with_its_position(detector, kind, batch_size, tmp_path):
    make, message = INVALID[kind]
    with pytest.raises(UserError, match=message) as caught:
        detector.detect([IMAGE, make(tmp_path)], batch_size=batch_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 1.5}, {"score_threshold": -0.1}, {"score_threshold": "high"}]
)
def test_invalid_options_are_refused_by_name(detector, options):
    ((name, value),) = options.items()
    with pytest.raises(ArgumentError, match=rf"^{name}={value}: must be"):
        detector.detect([IMAGE], **options)


@pytest.mark.parametrize("sizes", [{"short_side": 0}, {"max_size": 0}, {"max_size": None}])
def test_invalid_sizes_are_refused_by_the_name_of_the_data_option(detector, sizes):
    with pytest.raises(ArgumentError, match=rf"^test_{next(iter(sizes))}="):
        Detector(detector.model, CATEGORIES, **sizes)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_images_of_extreme_shapes_can_be_used(detector, shape):
    (found,) = detector.detect([random_image(*shape)])
    assert found.boxes.isfinite().all()


def test_short_side_none_keeps_the_original_size(detector):
    original = Detector(detector.model, CATEGORIES, short_side=None)
    (found,) = original.detect([IMAGE])
    with torch.inference_mode():
        (expected,) = detector.model([IMAGE])
    assert torch.equal(found.boxes, expected["boxes"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_multi_scale_detection_equals_the_multi_scale_detector(detector, batch_size):
    settings = MultiScaleSettings(scales=[0.8, 1.28], max_size=1.92)
    images = [random_image(50, 80, seed) for seed in range(2)]
    multi_scale = Detector(detector.model, CATEGORIES, short_side=50, multi_scale=settings)
    found = multi_scale.detect(images, batch_size=batch_size)
    reference = MultiScaleDetector(detector.model, settings, detector.convention, 50)
    for k in range(0, 2, batch_size):
        with torch.inference_mode():
            expected = reference(images[k : k + batch_size])
        for ours, theirs in zip(found[k : k + batch_size], expected, strict=True):
            assert len(ours) > 0
            assert all(torch.equal(value, theirs[name]) for name, value in ours.to_dict().items())
    single = detector.detect(images)
    assert not all(same(a, b) for a, b in zip(found, single))


def test_thresholds_per_class_select_the_detections_of_each_class(detector, expected):
    cats, dogs = (expected.scores[expected.labels == label] for label in (1, 2))
    threshold = cats[1].item()
    (found,) = detector.detect([IMAGE], score_threshold=[threshold, 0])
    assert sorted(found.labels.tolist()) == [1, 1] + [2] * len(dogs)
    assert torch.equal(found.scores[found.labels == 1], cats[:2])
    (found,) = detector.detect([IMAGE], score_threshold=[float("inf"), 0])
    assert set(found.labels.tolist()) == {2}


def test_the_thresholds_of_a_detector_are_those_of_its_operating_points(detector):
    points = {name: {"threshold": score} for name, score in (("cat", 0.25), ("dog", 0.5), ("other", 0.75))}
    classes = {
        "the dog": {"id": 8, "best_f1": points["dog"], "precision": None},
        "the cat": {"id": 3, "best_f1": points["cat"], "precision": points["other"]},
    }
    stored = {"iou": 0.5, "target_precision": 0.9, "classes": classes}
    known = Detector(detector.model, CATEGORIES, operating_points=stored)
    assert known.operating_points == stored
    assert known.thresholds() == known.thresholds("best_f1") == [0.25, 0.5]
    assert known.thresholds("precision") == [0.75, float("inf")]
    del classes["the cat"]
    assert known.thresholds() == [float("inf"), 0.5]
    with pytest.raises(ArgumentError, match=r"^kind=f1: must be one of best_f1, precision"):
        known.thresholds("f1")
    with pytest.raises(UserError, match="no target precision"):
        Detector(detector.model, CATEGORIES, operating_points=stored | {"target_precision": None}).thresholds(
            "precision"
        )
    with pytest.raises(UserError, match="the detector has no operating points"):
        detector.thresholds()


def test_details_are_returned_on_request_only(detector, expected):
    assert expected.class_scores is expected.predicted_iou is expected.rsm_probability is None
    assert list(expected.to_dict()) == ["boxes", "scores", "labels"]
    (found,) = detector.detect([IMAGE], details=True)
    assert same(found, expected)
    product = (found.class_scores * found.predicted_iou) ** 0.8 * found.rsm_probability**0.2
    torch.testing.assert_close(product, found.scores)
    assert list(found.to_dict()) == ["boxes", "scores", "labels", *DETAILS]


def test_details_follow_the_score_threshold(detector, expected):
    threshold = expected.scores[2].item()
    (found,) = detector.detect([IMAGE], score_threshold=threshold, details=True)
    (every,) = detector.detect([IMAGE], details=True)
    assert 3 <= len(found) < len(every)
    assert all(torch.equal(getattr(found, name), getattr(every, name)[: len(found)]) for name in DETAILS)


def test_details_of_the_multi_scale_test_are_those_of_the_kept_box(detector):
    settings = MultiScaleSettings(scales=[0.8, 1.28], max_size=1.92)
    multi_scale = Detector(detector.model, CATEGORIES, short_side=50, multi_scale=settings)
    (found,), (plain,) = multi_scale.detect([IMAGE], details=True), multi_scale.detect([IMAGE])
    assert same(found, plain)
    product = (found.class_scores * found.predicted_iou) ** 0.8 * found.rsm_probability**0.2
    # Soft-NMS only reduces scores, and does not change that of the best box.
    assert (found.scores <= product * (1 + 1e-5)).all()
    assert (found.scores < product * 0.99).any()
    torch.testing.assert_close(found.scores[0], product[0])
