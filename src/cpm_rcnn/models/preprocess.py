"""How uint8 images become what a backbone was trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpm_rcnn.errors import UserError, check_choice, check_list, check_range
from cpm_rcnn.boxes import BoxConvention

_DIVISOR = 32


class ImagePreprocessor(nn.Module):
    """Normalise uint8 RGB images and pad them into one batch, on their device.

    A uint8 value v becomes ``(v / scale - mean) / std``.

    Args:
        order: channel order that the backbone wants, ``rgb`` or ``bgr``.
        scale: what uint8 values are divided by before mean and std: 255 for a 0..1 format, 1 for 0..255.
        mean: per channel, in the backbone's order and range.
        std: likewise.
        convention: decides what padding holds.

    Raises:
        UserError: an unknown order, or mean or std not of three numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, order: str, scale: float, mean: Sequence[float], std: Sequence[float], convention: BoxConvention
    ) -> None:
        super().__init__()
        check_choice("backbone.pixel_format.order", order, ("rgb", "bgr"))
        check_range("backbone.pixel_format.scale", scale, 1)
        for key, values in (("mean", mean), ("std", std)):
            check_list(f"backbone.pixel_format.{key}", values)
            if len(values) != 3 or not all(isinstance(value, (int, float)) for value in values):
                raise UserError(f"backbone.pixel_format.{key}={list(values)}: must be three numbers")
        if min(std) <= 0:
            raise UserError(f"backbone.pixel_format.std={list(std)}: must be above 0")
        self.flip_channels = order == "bgr"
        # Folded into the raw range, so that normalising is one subtraction and one product.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1) * scale, persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1) * scale, persistent=False)
        self.convention = convention

    def forward(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """One batch of all images, top left, padded to multiples of 32.

        Args:
            images: B tensors uint8 (3, H, W), RGB.

        Returns:
            The batch (B, 3, H, W) in the buffers' dtype, and the images' sizes (B, 2) int64, height and width.
        """
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (-(-max(side) // _DIVISOR) * _DIVISOR for side in zip(*sizes))
        batch = self.mean.new_zeros(len(images), 3, height, width)
        if self.convention.pads_raw:
            batch -= self.mean / self.std
        for row, image, (h, w) in zip(batch, images, sizes):
            channels = image.flip(0) if self.flip_channels else image
            row[:, :h, :w] = (channels - self.mean) / self.std
        # From a list in host memory: no wait for the device.
        return batch, torch.tensor(sizes).to(batch.device, non_blocking=True)
