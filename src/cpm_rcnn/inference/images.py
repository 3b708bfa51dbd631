"""Conversion of paths, PIL images, arrays and tensors to uint8 image tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cpm_rcnn.data.images import ImageSource, rgb_tensor
from cpm_rcnn.errors import UserError, check_file


def to_image(value: Any, name: str = "image") -> Tensor:
    """An image as a uint8 RGB tensor (3, H, W).

    Args:
        value: a path; a PIL image; a uint8 array (H, W, 3), RGB, or (H, W), gray; or a uint8 RGB tensor (3, H, W). A
            file is rotated as its EXIF orientation says; a PIL image is used as it is.
        name: name of the image in messages.

    Raises:
        UserError: the file cannot be read, or ``value`` has another type, dtype or shape.
    """
    if isinstance(value, (str, Path)):
        path = check_file(name, value)
        try:
            return ImageSource(path.parent).read(path.name)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error.__cause__
    if isinstance(value, Image.Image):
        if 0 in value.size:
            raise UserError(f"{name} is a PIL image without pixels {value.size}")
        try:
            return rgb_tensor(value)
        except UserError as error:
            raise UserError(f"{name} {error}") from None
    if isinstance(value, np.ndarray):
        pixels = value[:, :, None].repeat(3, axis=2) if value.ndim == 2 else value
        if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
            return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        raise UserError(f"{name} is a {value.dtype} array {value.shape}: must be uint8 (H, W, 3), RGB, or (H, W)")
    if isinstance(value, Tensor):
        if value.dtype == torch.uint8 and value.ndim == 3 and value.shape[0] == 3 and value.numel():
            return value
        raise UserError(f"{name} is {value.dtype} {tuple(value.shape)}: must be torch.uint8 (3, H, W), RGB")
    raise UserError(f"{name} is a {type(value).__name__}: must be a path, a PIL image, an array or a tensor")
