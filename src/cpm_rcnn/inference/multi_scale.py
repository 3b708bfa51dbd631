"""The multi-scale test: detect at several sizes, with and without a flip, and merge the detections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from cpm_rcnn.boxes import BoxConvention
from cpm_rcnn.data.transforms import network_size
from cpm_rcnn.inference.soft_nms import soft_nms_rows
from cpm_rcnn.inference.to_host import to_host
from cpm_rcnn.models.host import from_host
from cpm_rcnn.settings import Settings, flag, inference, list_of, number

# docs/method.md section 8.
_SOFT_NMS_IOU = 0.5
_MAX_DETECTIONS = 100


@dataclass(frozen=True)
class MultiScaleSettings(Settings):
    """Settings of the multi-scale test (docs/method.md section 8).

    Sizes are relative to the size at which the model is tested, so that they suit every model. At 800 pixels the
    defaults are the paper's 400, 500, .., 1200 with a longer side of at most 2000.

    Attributes:
        scales: factors of the model's shorter side, 0.05 to 20.
        max_size: maximum of the longer side, as a factor of the model's shorter side; it takes precedence over
            ``scales``.
        flip: whether the horizontally flipped images are used in addition.
    """

    scales: Sequence[float] = inference(
        (0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.375, 1.5), check=list_of(number(0.05, 20))
    )
    max_size: float = inference(2.5, check=number(0.05, 20))
    flip: bool = inference(True, check=flag)


class MultiScaleDetector(nn.Module):
    """Runs a detector on each image at several scales, with and without a flip.

    The detections of all views are transformed to pixels of the original image and merged with linear soft-NMS per
    class. Other columns, such as ``predicted_iou``, are those of the box that soft-NMS keeps, in the view in which it
    was detected. Soft-NMS changes scores only.

    Args:
        detector: maps a list of uint8 (3, H, W) images of any size to one dict per image: ``boxes`` (N, 4) in xyxy
            pixels of the given image, ``scores`` (N,) and ``labels`` (N,), and optionally other columns (N,).
        settings: scales and flip.
        convention: the box coordinate convention of the detector.
        short_side: length in pixels of the shorter side at which the model is tested otherwise.
    """

    def __init__(
        self,
        detector: Callable[[Sequence[Tensor]], list[dict[str, Tensor]]],
        settings: MultiScaleSettings,
        convention: BoxConvention,
        short_side: int,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.settings = settings
        self.convention = convention
        self.short_side = short_side

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detect objects in images of their original size.

        Args:
            images: uint8 (3, H, W), on the detector's device.

        Returns:
            One dict per image, on the CPU, best score first: ``boxes`` (N, 4) in pixels of that image, ``scores``
            (N,), ``labels`` (N,), and the other columns of the detector.
        """
        views: list[list[dict[str, Tensor]]] = []
        for scale in self.settings.scales:
            resized = [self._resized(image, scale) for image in images]
            views.append(self._detect(images, resized, mirrored=False))
            if self.settings.flip:
                views.append(self._detect(images, resized, mirrored=True))
        # Merging reads values in a loop, so it runs on the CPU.
        on_host = iter(to_host([found for view in views for found in view]))
        views = [[next(on_host) for _ in images] for _ in views]
        return [self._merge(found) for found in zip(*views)]

    def _resized(self, image: Tensor, scale: float) -> Tensor:
        _, height, width = image.shape
        short_side, max_size = (max(1, round(factor * self.short_side)) for factor in (scale, self.settings.max_size))
        size = network_size((height, width), short_side, max_size)
        return F.resize(image, list(size), antialias=True)

    def _detect(self, images: Sequence[Tensor], resized: list[Tensor], mirrored: bool) -> list[dict[str, Tensor]]:
        """Detections in the resized images, or in their mirror images, in pixels of ``images``."""
        found = self.detector([image.flip(-1) for image in resized] if mirrored else resized)
        back = []
        for image, small, detections in zip(images, resized, found, strict=True):
            boxes = detections["boxes"]
            size, small_size = (from_host(tensor.shape[-2:], boxes) for tensor in (image, small))
            if mirrored:
                boxes = self.convention.flip(boxes, small.shape[-1])
            # Sizes are rounded to whole pixels, so height and width have different ratios.
            boxes = boxes * (size / small_size).flip(0).repeat(2)
            back.append({**detections, "boxes": self.convention.clip(boxes, size)})
        return back

    def _merge(self, views: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Merge the detections of one image's views."""
        columns = {key: torch.cat([view[key] for view in views]) for key in views[0]}
        rows, scores = soft_nms_rows(columns["boxes"], columns["scores"], columns["labels"], _SOFT_NMS_IOU)
        rows, scores = rows[:_MAX_DETECTIONS], scores[:_MAX_DETECTIONS]
        return {**{key: column[rows] for key, column in columns.items()}, "scores": scores}
