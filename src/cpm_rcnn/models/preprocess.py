"""From uint8 images to the normalized batch that a backbone expects."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.models.backbones.input_format import InputFormat
from cpm_rcnn.ops.normalize import normalize_image

_DIVISOR = 32


class ImagePreprocessor(nn.Module):
    """Normalizes uint8 RGB images and pads them into one batch, on their device.

    Args:
        input_format: channel order, range, mean and std that the backbone expects.
        convention: decides whether padding is zero before or after the normalization at test. In training it is zero
            after the normalization, as in the release (docs/method.md section 11).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, input_format: InputFormat, convention: BoxConvention) -> None:
        super().__init__()
        self.flip_channels = input_format.order == "bgr"
        # Scaled to 0..255, so that normalizing is one subtraction and one division.
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (input_format.mean, input_format.std))
        self.register_buffer("mean", mean.view(3, 1, 1) * input_format.scale, persistent=False)
        self.register_buffer("std", std.view(3, 1, 1) * input_format.scale, persistent=False)
        self.convention = convention

    def forward(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One batch with all images at the top left, padded to multiples of 32.

        Args:
            images: B uint8 RGB tensors (3, H, W).

        Returns:
            The batch (B, 3, H, W) in the buffers' dtype, and the sizes (B, 2) int64 of the images: height and width.
        """
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (-(-max(side) // _DIVISOR) * _DIVISOR for side in zip(*sizes))
        batch = self.mean.new_empty(len(images), 3, height, width)
        padding = -self.mean / self.std if self.convention.pads_raw and not self.training else 0.0
        for row, image, (h, w) in zip(batch, images, sizes):
            row[:, h:] = padding
            row[:, :h, w:] = padding
            normalize_image(image, self.mean, self.std, row[:, :h, :w], reverse=self.flip_channels)
        # Copied from host memory, so that nothing waits for the device.
        return batch, torch.tensor(sizes).to(batch.device, non_blocking=True)

    def stacked(self, images: Tensor, sizes: Tensor) -> Tensor:
        """The batch of :meth:`forward`, at test, from images that are padded already.

        Args:
            images: (B, 3, H, W) uint8, RGB, the images at the top left; H and W are multiples of 32.
            sizes: (B, 2) int64, height and width of the images. Other pixels have no effect.
        """
        channels = images.flip(1) if self.flip_channels else images
        batch = (channels - self.mean) / self.std
        y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        inside = (y[:, None] < sizes[:, 0, None, None]) & (x < sizes[:, 1, None, None])
        outside = -self.mean / self.std if self.convention.pads_raw else torch.zeros_like(self.mean)
        return torch.where(inside[:, None], batch, outside)
