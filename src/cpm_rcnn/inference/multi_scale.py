"""The multi-scale test: detect at many sizes and in the mirror, then merge."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from cpm_rcnn.boxes import CONTINUOUS, BoxConvention
from cpm_rcnn.data.transforms import network_size
from cpm_rcnn.errors import check_count, check_list
from cpm_rcnn.inference.soft_nms import soft_nms


class MultiScaleDetector(nn.Module):
    """A detector that looks at each image at several scales, with and without a flip (spec section 8).

    What the inner detector finds at any of them is brought back to the image's own pixels, and all of it is
    merged with linear soft-NMS per class.
    """

    def __init__(
        self,
        detector: nn.Module,
        scales: Sequence[int] = tuple(range(400, 1201, 100)),
        max_size: int = 2000,
        flip: bool = True,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        convention: BoxConvention = CONTINUOUS,
    ) -> None:
        """Wrap a detector.

        Args:
            detector: from a list of uint8 (3, H, W) images of any size to one dict per image of ``boxes``
                (N, 4) xyxy in pixels of the image it was given, ``scores`` (N,) and ``labels`` (N,).
            scales: lengths in pixels to bring an image's shorter side to.
            max_size: the most that its longer side may then have, in pixels; the scale gives way.
            flip: whether to look at the mirror image too.
            iou_threshold: overlap above which soft-NMS lowers scores.
            max_detections: the most to return per image, those with the highest scores.
            convention: the meaning of the detector's x2 and y2.

        Raises:
            UserError: scales or sizes that are no whole numbers, or no scale at all.
        """
        super().__init__()
        check_list("multi_scale.scales", scales)
        check_count("number of multi_scale.scales", len(scales))
        for scale in scales:
            check_count("multi_scale.scales", scale)
        check_count("multi_scale.max_size", max_size)
        self.detector = detector
        self.scales = tuple(scales)
        self.max_size = max_size
        self.flip = flip
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections
        self.convention = convention

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detect in images at their original size.

        Args:
            images: uint8 (3, H, W) each, on the detector's device.

        Returns:
            One dict per image of ``boxes`` (N, 4) in its own pixels, ``scores`` (N,) in descending order and
            ``labels`` (N,).
        """
        views: list[list[dict[str, Tensor]]] = []
        for scale in self.scales:
            resized = [self._resized(image, scale) for image in images]
            views.append(self._detect(images, resized, mirrored=False))
            if self.flip:
                views.append(self._detect(images, resized, mirrored=True))
        return [self._merge(found) for found in zip(*views)]

    def _resized(self, image: Tensor, scale: int) -> Tensor:
        _, height, width = image.shape
        size = network_size((height, width), scale, self.max_size)
        return F.resize(image, list(size), antialias=True)

    def _detect(self, images: Sequence[Tensor], resized: list[Tensor], mirrored: bool) -> list[dict[str, Tensor]]:
        """Detections in the resized images, or in their mirror, in pixels of ``images``."""
        found = self.detector([image.flip(-1) for image in resized] if mirrored else resized)
        back = []
        for image, small, detections in zip(images, resized, found, strict=True):
            boxes = detections["boxes"]
            size, small_size = (boxes.new_tensor(tensor.shape[-2:]) for tensor in (image, small))
            if mirrored:
                boxes = self.convention.flip(boxes, small.shape[-1])
            # Height and width have ratios of their own, since a size is rounded to whole pixels.
            boxes = boxes * (size / small_size).flip(0).repeat(2)
            back.append({**detections, "boxes": self.convention.clip(boxes, size)})
        return back

    def _merge(self, views: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What one image's views found together."""
        boxes, scores, labels = (torch.cat([view[key] for view in views]) for key in ("boxes", "scores", "labels"))
        boxes, scores, labels = soft_nms(boxes, scores, labels, self.iou_threshold)
        kept = slice(self.max_detections)
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
