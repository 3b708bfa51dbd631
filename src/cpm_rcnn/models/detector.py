"""CPM R-CNN: images -> backbone -> RPN -> CPM head -> detections or losses."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.backbones.build import FPNBackbone
from cpm_rcnn.models.heads.cpm import CPMHead, Detections
from cpm_rcnn.models.losses import resolve
from cpm_rcnn.models.preprocess import ImagePreprocessor
from cpm_rcnn.models.pooling import pooling_format
from cpm_rcnn.models.structures import GroundTruth
from cpm_rcnn.models.rpn import RegionProposalNetwork


class CPMRCNN(nn.Module):
    """The detector of arXiv 2003.03570; :func:`~cpm_rcnn.models.build.build_detector` makes one from plain arguments.

    Args:
        pixel_format: uint8 images to a normalised batch.
        backbone: that batch to the pyramid P2..P6.
        rpn: the pyramid to proposals.
        head: proposals to detections, on P2..P5.
    """

    def __init__(
        self, pixel_format: ImagePreprocessor, backbone: FPNBackbone, rpn: RegionProposalNetwork, head: CPMHead
    ) -> None:
        super().__init__()
        self.pixel_format = pixel_format
        # The format that convolutions are fastest in; the grid heads stay as they are, GroupNorm would copy there.
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.rpn = rpn
        self.head = head

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Detections in eval mode, losses in train mode; images and targets as torchvision's detectors take them.

        Args:
            images: uint8 RGB tensors (3, H, W) at network size (what the model sees; nothing is resized here).
            targets: needed in train mode: a dict an image with ``boxes`` (N, 4) xyxy pixels and ``labels`` (N,)
                int64 1..C; N may be 0.

        Returns:
            In eval mode a dict an image: ``boxes`` (N, 4) float32 xyxy pixels of the given image, best score first
            (they may reach beyond the image's border: grid points do), ``scores`` (N,) float32 0..1 and ``labels``
            (N,) int64 1..C. In train mode a dict of () float32 losses, whose sum is to be minimised.

        Raises:
            UserError: images that are not uint8 (3, H, W), or train mode without a target for each image.
        """
        for i, image in enumerate(images):
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise UserError(
                    f"images[{i}] is {image.dtype} {tuple(image.shape)}: must be torch.uint8 (3, H, W), RGB"
                )
        if not len(images):
            raise UserError("images is empty: at least one is needed")
        if self.training and (targets is None or len(targets) != len(images)):
            raise UserError(f"train mode needs one target for each of the {len(images)} images")
        batch, sizes = self.pixel_format(images)
        features = list(self.backbone(batch.contiguous(memory_format=torch.channels_last)).values())
        if not self.training:
            proposals, _ = self.rpn(features, sizes)
            return _split(self.head.detect(pooling_format(features), proposals), len(images))
        assert targets is not None
        truth = GroundTruth.stack(targets)
        proposals, losses = self.rpn(features, sizes, truth)
        return resolve(losses | self.head.losses(pooling_format(features), proposals, truth))


def _split(detections: Detections, num_images: int) -> list[dict[str, Tensor]]:
    """A dict an image, best score first."""
    order = detections.scores.argsort(descending=True, stable=True)
    order = order[detections.rois.images[order].argsort(stable=True)]
    counts = torch.bincount(detections.rois.images, minlength=num_images).tolist()
    return [
        {
            "boxes": detections.rois.boxes[rows],
            "scores": detections.scores[rows],
            "labels": detections.labels[rows],
        }
        for rows in order.split(counts)
    ]
