import pytest
import torch

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.preprocess import ImagePreprocessor
from cpm_rcnn.boxes import CONTINUOUS, CONVENTIONS, INCLUSIVE

IMAGENET = {"order": "rgb", "scale": 255.0, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CAFFE = {"order": "bgr", "scale": 1.0, "mean": (102.9801, 115.9465, 122.7717), "std": (1.0, 1.0, 1.0)}


def random_image(height, width, seed=0):
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("settings", [IMAGENET, CAFFE], ids=["imagenet", "caffe"])
def test_every_value_is_scaled_and_normalised_in_the_order_of_the_backbone(settings):
    image = random_image(32, 64)
    batch, _ = ImagePreprocessor(**settings, convention=CONTINUOUS)([image])
    for channel in range(3):
        source = {"rgb": channel, "bgr": 2 - channel}[settings["order"]]
        expected = (image[source].double() / settings["scale"] - settings["mean"][channel]) / settings["std"][channel]
        torch.testing.assert_close(batch[0, channel].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pixels", CONVENTIONS.values(), ids=lambda pixels: pixels.name)
@pytest.mark.parametrize("settings", [IMAGENET, CAFFE], ids=["imagenet", "caffe"])
def test_images_stand_top_left_in_a_batch_padded_to_multiples_of_32(settings, convention):
    images = [random_image(33, 20), random_image(10, 65, seed=1)]
    batch, sizes = ImagePreprocessor(**settings, convention=convention)(images)
    assert batch.shape == (2, 3, 64, 96)
    assert (sizes.tolist(), sizes.dtype) == ([[33, 20], [10, 65]], torch.int64)
    for row, image in zip(batch, images):
        height, width = image.shape[1:]
        alone, _ = ImagePreprocessor(**settings, convention=convention)([image])
        torch.testing.assert_close(row[:, :height, :width], alone[0, :, :height, :width])
        outside = torch.ones(64, 96, dtype=torch.bool)
        outside[:height, :width] = False
        for channel in range(3):
            # Raw zeros, then normalised; or zeros after normalising.
            value = -settings["mean"][channel] / settings["std"][channel] if pixels is INCLUSIVE else 0.0
            torch.testing.assert_close(row[channel, outside], torch.full((int(outside.sum()),), value))


def test_multiple_of_32_is_not_padded_and_the_image_is_left_alone():
    image = random_image(64, 96)
    kept = image.clone()
    batch, _ = ImagePreprocessor(**CAFFE, convention=CONTINUOUS)([image])
    assert batch.shape == (1, 3, 64, 96)
    assert torch.equal(image, kept)


def test_whole_numbers_for_mean_std_and_scale_mean_the_same():
    whole = ImagePreprocessor("rgb", 1, (103, 116, 123), (2, 2, 2), CONTINUOUS)
    real = ImagePreprocessor("rgb", 1.0, (103.0, 116.0, 123.0), (2.0, 2.0, 2.0), CONTINUOUS)
    image = random_image(32, 32)
    assert torch.equal(whole([image])[0], real([image])[0])


def test_batch_has_the_modules_dtype():
    pixel_format = ImagePreprocessor(**IMAGENET, convention=CONTINUOUS).to(torch.bfloat16)
    assert pixel_format([random_image(32, 32)])[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "value"), [("order", "gbr"), ("scale", 0.0), ("mean", (0.0, 0.0)), ("std", (1.0,) * 4)]
)
def test_bad_setting_is_the_users_error_and_named(key, value):
    with pytest.raises(UserError, match=rf"backbone\.pixel_format\.{key}="):
        ImagePreprocessor(**IMAGENET | {key: value}, convention=CONTINUOUS)
