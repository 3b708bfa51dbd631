import pytest
import torch
from inputs import random_image

from cpm_rcnn.boxes import CONTINUOUS, INCLUSIVE
from cpm_rcnn.models.backbones import CAFFE, RGB, InputFormat
from cpm_rcnn.models.preprocess import ImagePreprocessor

both_formats = pytest.mark.parametrize("input_format", [RGB, CAFFE], ids=["rgb", "caffe"])


@both_formats
def test_values_are_scaled_and_normalized_in_the_channel_order_of_the_backbone(input_format):
    image = random_image(32, 64)
    batch, _ = ImagePreprocessor(input_format, CONTINUOUS)([image])
    for channel in range(3):
        source = {"rgb": channel, "bgr": 2 - channel}[input_format.order]
        scaled = image[source].double() / input_format.scale
        expected = (scaled - input_format.mean[channel]) / input_format.std[channel]
        torch.testing.assert_close(batch[0, channel].double(), expected, rtol=0, atol=1e-4)


@both_formats
@pytest.mark.parametrize("training", [True, False], ids=["train", "test"])
def test_images_are_at_the_top_left_of_a_batch_padded_to_multiples_of_32(input_format, convention, training):
    images = [random_image(33, 20), random_image(10, 65, seed=1)]
    batch, sizes = ImagePreprocessor(input_format, convention).train(training)(images)
    assert batch.shape == (2, 3, 64, 96)
    assert (sizes.tolist(), sizes.dtype) == ([[33, 20], [10, 65]], torch.int64)
    for row, image in zip(batch, images):
        height, width = image.shape[1:]
        alone, _ = ImagePreprocessor(input_format, convention)([image])
        torch.testing.assert_close(row[:, :height, :width], alone[0, :, :height, :width])
        outside = torch.ones(64, 96, dtype=torch.bool)
        outside[:height, :width] = False
        for channel in range(3):
            # At test, the inclusive convention pads before the normalization.
            raw = convention is INCLUSIVE and not training
            value = -input_format.mean[channel] / input_format.std[channel] if raw else 0.0
            torch.testing.assert_close(row[channel, outside], torch.full((int(outside.sum()),), value))


@both_formats
@pytest.mark.parametrize("channels_last", [False, True])
def test_image_whose_sides_are_multiples_of_32_is_neither_padded_nor_changed(input_format, channels_last):
    image = random_image(64, 96)
    if channels_last:
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    kept = image.clone()
    preprocessor = ImagePreprocessor(input_format, CONTINUOUS)
    batch, _ = preprocessor([image, image])
    assert batch.shape == (2, 3, 64, 96)
    assert torch.equal(image, kept)
    # Another batch does not change the first one.
    first = batch.clone()
    preprocessor([255 - image, image])
    assert torch.equal(batch, first)
    assert torch.equal(batch[0], batch[1])


def test_integer_mean_std_and_scale_equal_floats():
    integers = ImagePreprocessor(InputFormat("rgb", 1, (103, 116, 123), (2, 2, 2)), CONTINUOUS)
    floats = ImagePreprocessor(InputFormat("rgb", 1.0, (103.0, 116.0, 123.0), (2.0, 2.0, 2.0)), CONTINUOUS)
    image = random_image(32, 32)
    assert torch.equal(integers([image])[0], floats([image])[0])


def test_batch_has_the_dtype_of_the_module():
    preprocessor = ImagePreprocessor(RGB, CONTINUOUS).to(torch.bfloat16)
    assert preprocessor([random_image(32, 32)])[0].dtype == torch.bfloat16
