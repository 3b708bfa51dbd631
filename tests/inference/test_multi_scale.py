"""The multi-scale test: views at several scales and mirrored, mapped back and merged."""

import pytest
import torch
from torch import nn

from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS
from cpm_rcnn.errors import ArgumentError
from cpm_rcnn.inference.multi_scale import MultiScaleDetector, MultiScaleSettings

SHORT_SIDE = 100


def _multi_scale(detector, convention=CONTINUOUS, *, scales, max_size=2000, flip=True):
    """A detector whose scales and maximum size are given in pixels; the settings are factors of ``SHORT_SIDE``."""
    settings = MultiScaleSettings([scale / SHORT_SIDE for scale in scales], max_size / SHORT_SIDE, flip)
    return MultiScaleDetector(detector, settings, convention, SHORT_SIDE)


class _ColorDetector(nn.Module):
    """Detects the extent of pure red (label 1) and pure green (label 2), in the convention given."""

    def __init__(self, convention=CONTINUOUS):
        super().__init__()
        self.convention = convention
        self.sizes = []

    def forward(self, images):
        self.sizes.append([tuple(image.shape[-2:]) for image in images])
        found = []
        for image in images:
            assert image.dtype == torch.uint8
            boxes, labels = [], []
            for channel in (0, 1):
                y, x = (image[channel] > 127).nonzero(as_tuple=True)
                if len(x):
                    end = 1 - self.convention.extra
                    boxes.append([x.min().item(), y.min().item(), x.max().item() + end, y.max().item() + end])
                    labels.append(channel + 1)
            found.append(
                {
                    "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                    "scores": torch.full((len(boxes),), 0.9),
                    "labels": torch.tensor(labels, dtype=torch.int64),
                }
            )
        return found


def _image(height, width, **rectangles):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for color, (x1, y1, x2, y2) in rectangles.items():
        image[["red", "green"].index(color), y1:y2, x1:x2] = 255
    return image


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("scale", [50, 97, 160, 240])
@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_are_mapped_back_from_every_scale_and_from_the_mirror_image(name, scale, mirrored):
    convention = CONVENTIONS[name]
    red, green = (10, 20, 60, 50), (90, 5, 131, 88)
    image = _image(100, 150, red=red, green=green)
    inner = _ColorDetector(convention)
    if mirrored:  # detections in the mirror image only
        plain = inner.forward
        calls = []

        def forward(images):
            calls.append(1)
            found = plain(images)
            return found if len(calls) == 2 else [{k: v[:0] for k, v in one.items()} for one in found]

        inner.forward = forward
    detector = _multi_scale(inner, convention, scales=[scale], flip=mirrored)

    (found,) = detector([image])

    by_label = dict(zip(found["labels"].tolist(), found["boxes"]))
    expected = torch.tensor([red, green], dtype=torch.float32)
    expected[:, 2:] -= convention.extra
    tolerance = 0.51 * 100 / scale + 0.51 + convention.extra * abs(1 - 100 / scale)
    assert (torch.stack([by_label[1], by_label[2]]) - expected).abs().max() <= tolerance


def test_scales_are_lengths_of_the_shorter_side_and_are_reduced_to_the_maximum_of_the_longer_side():
    inner = _ColorDetector()
    _multi_scale(inner, scales=[40, 80], max_size=120, flip=False)([_image(50, 100), _image(90, 60)])
    assert inner.sizes == [[(40, 80), (60, 40)], [(60, 120), (120, 80)]]


def test_the_views_of_one_object_are_merged_into_one_box_of_high_score():
    inner = _ColorDetector()
    (found,) = _multi_scale(inner, scales=[100, 200, 300])([_image(100, 150, red=(10, 20, 60, 50))])
    assert len(inner.sizes) == 6
    assert found["scores"][0] == pytest.approx(0.9)
    assert (found["scores"][1:] < 0.1).all()
    assert (found["boxes"][0] - torch.tensor([10.0, 20, 60, 50])).abs().max() < 1


def test_images_without_detections_have_empty_results():
    found = _multi_scale(_ColorDetector(), scales=[60])([_image(50, 50), _image(50, 70, red=(0, 0, 20, 20))])
    assert [len(one["boxes"]) for one in found] == [0, 1]
    assert found[0]["boxes"].shape == (0, 4)


def test_at_most_100_detections_are_returned_best_first():
    class Many(nn.Module):
        def forward(self, images):
            left = torch.arange(150.0) * 10
            boxes = torch.stack([left, left * 0, left + 5, left * 0 + 5], 1)
            return [
                {"boxes": boxes, "scores": torch.linspace(0.1, 0.9, 150), "labels": torch.ones(150).long()}
                for _ in images
            ]

    (found,) = _multi_scale(Many(), scales=[20], flip=False)([_image(20, 1500)])
    assert len(found["scores"]) == 100
    assert torch.allclose(found["scores"], torch.linspace(0.1, 0.9, 150).flip(0)[:100])


def test_at_800_pixels_the_default_is_the_release_s_multi_scale_test():
    settings = MultiScaleSettings()
    assert [factor * 800 for factor in settings.scales] == [400, 500, 600, 700, 800, 900, 1000, 1100, 1200]
    assert settings.max_size * 800 == 2000
    assert settings.flip


@pytest.mark.parametrize(
    "values", [{"scales": []}, {"scales": [0]}, {"scales": 400}, {"scales": [400]}, {"max_size": 0}, {"flip": 1}]
)
def test_invalid_settings_are_refused_by_name(values):
    with pytest.raises(ArgumentError, match=f"^{next(iter(values))}="):
        MultiScaleSettings(**values)
