"""A two-stage detector: images -> backbone -> FPN -> RPN -> RoI head -> detections or losses."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from cpm_rcnn.errors import ArgumentError, UserError, check_choice, check_flag
from cpm_rcnn.models.compiled import compile_layers
from cpm_rcnn.models.finite import check_output
from cpm_rcnn.models.fpn import FPNBackbone
from cpm_rcnn.models.heads import RoIHead
from cpm_rcnn.models.host import Requirement, read, requirements_deferred
from cpm_rcnn.models.losses import reduce_losses
from cpm_rcnn.models.pooling import pooling_format
from cpm_rcnn.models.preprocess import ImagePreprocessor
from cpm_rcnn.models.rpn import RegionProposalNetwork
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.models.structures import DETAILS, Detections, GroundTruth, count_per_image
from cpm_rcnn.models.targets import check_targets
from cpm_rcnn.ops import DeformConv2dPack
from cpm_rcnn.ops.conv3x3 import Conv3x3

# Layers that autocast computes in bfloat16. Subclasses may use their weights in other ways.
_CAST_LAYERS = (nn.Conv2d, Conv3x3, nn.ConvTranspose2d, nn.Linear, DeformConv2dPack)


class TwoStageDetector(nn.Module):
    """The model of this project; :func:`~cpm_rcnn.models.build.build_detector` constructs it from plain arguments.

    Args:
        settings: the settings that the other arguments were built from.
        num_classes: number of foreground classes.
        preprocessor: converts uint8 images to a normalized batch.
        backbone: computes the feature pyramid P2..P6 of the batch.
        rpn: predicts proposals from the pyramid.
        head: predicts detections from the pyramid and the proposals.

    Attributes:
        inference_dtype: the dtype of :meth:`optimize`; None before it.
    """

    def __init__(
        self,
        settings: ModelSettings,
        num_classes: int,
        preprocessor: ImagePreprocessor,
        backbone: FPNBackbone,
        rpn: RegionProposalNetwork,
        head: RoIHead,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.num_classes = num_classes
        self.preprocessor = preprocessor
        # Convolutions are fastest in channels_last. The head stays contiguous, because GroupNorm would copy its input.
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.rpn = rpn
        self.head = head
        self.inference_dtype: torch.dtype | None = None
        self._compiled = False
        self._unread: list[Requirement] = []

    @torch.no_grad()
    def optimize(self, dtype: torch.dtype = torch.float32, compile: bool = False) -> None:
        """Change the weights, in place, to those that are fastest for inference. Train mode is an error afterwards.

        Args:
            dtype: float32 or bfloat16; see :meth:`Detector.optimize <cpm_rcnn.inference.Detector.optimize>`.
            compile: whether the layers are compiled with ``torch.compile`` at first use
                (:func:`~cpm_rcnn.models.compiled.compile_layers`).

        Raises:
            ArgumentError: another dtype, or float32 although the weights have been converted to bfloat16.
        """
        check_choice("dtype", dtype, (torch.float32, torch.bfloat16))
        check_flag("compile", compile)
        if self.inference_dtype is torch.bfloat16 and dtype is torch.float32:
            raise ArgumentError("dtype", "=torch.float32: the weights were converted to bfloat16; load the model again")
        self.eval().requires_grad_(False)
        fold_norms = getattr(self.backbone.body, "fold_norms", None)
        if fold_norms is not None:
            fold_norms()
        if dtype is torch.bfloat16:
            for module in self.modules():
                if type(module) in _CAST_LAYERS:
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.to(dtype)
        if compile:
            self.compile_layers()
        self.inference_dtype = dtype

    def compile_layers(self, mode: str | None = None) -> None:
        """Compile the layers for training and test, see :func:`~cpm_rcnn.models.compiled.compile_layers`.

        Raises:
            ArgumentError: there is no such mode.
        """
        compile_layers(self.backbone, self.rpn.head, self.head, mode)
        self._compiled = True

    def train(self, mode: bool = True) -> "TwoStageDetector":
        """Set train or eval mode.

        Raises:
            UserError: train mode after :meth:`optimize`.
        """
        if mode:
            self.check_trainable()
        return super().train(mode)

    def check_trainable(self) -> None:
        """Raise :class:`UserError` after :meth:`optimize`."""
        if self.inference_dtype is not None:
            raise UserError("the model was optimized for inference and cannot be trained; load the checkpoint again")

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        *,
        details: bool = False,
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Detections in eval mode, losses in train mode, with the interface of torchvision's detectors.

        Args:
            images: uint8 RGB tensors (3, H, W), already resized to the size that the network should see.
            targets: required in train mode: one dict per image with ``boxes`` (N, 4) in xyxy pixels and ``labels``
                (N,) int64 in 1..C; N may be 0.
            details: in eval mode, whether the dicts also say how each score was computed.

        Returns:
            In eval mode, one dict per image, best score first: ``boxes`` (N, 4) float32 in xyxy pixels of the given
            image, which may extend beyond the image; ``scores`` (N,) float32 in 0..1; ``labels`` (N,) int64 in 1..C.
            With ``details``, also those of ``class_scores``, ``predicted_iou`` and ``rsm_probability`` that the head
            computes, each (N,) float32 (:class:`~cpm_rcnn.models.structures.Detections`).
            In train mode, a dict of scalar float32 losses, whose sum is to be minimized.

        Raises:
            UserError: an image is not uint8 (3, H, W); in train mode, there is not one valid target per image; in eval
                mode, weights or outputs are not finite. On an accelerator, the host waits only where the head selects
                detections. Outputs after that are checked in the next call or by :meth:`check_outputs`.
        """
        for i, image in enumerate(images):
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise UserError(
                    f"images[{i}] is {image.dtype} {tuple(image.shape)}: must be torch.uint8 (3, H, W), RGB"
                )
        if not len(images):
            raise UserError("images is empty: at least one is needed")
        if self._compiled:
            # The CUDA graphs of the layers may reuse the memory of the previous step.
            torch.compiler.cudagraph_mark_step_begin()
        if self.training and (targets is None or len(targets) != len(images)):
            raise UserError(f"train mode needs one target for each of the {len(images)} images")
        if self.training:
            assert targets is not None
            check_targets(targets, self.num_classes, self.preprocessor.convention, images[0].device)
            return self._losses(images, GroundTruth.stack(targets))
        with requirements_deferred(self._unread), self._autocast(images[0].device):
            detections = self._detections(images)
            return _per_image(detections if details else detections.without_details(), len(images))

    def check_outputs(self) -> None:
        """Raise :class:`UserError` if outputs of the last call in eval mode are not finite and it could not know yet.

        It waits for an accelerator.
        """
        with requirements_deferred(self._unread):
            read(torch.zeros(0, device=self.preprocessor.mean.device))

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.inference_dtype is not torch.bfloat16:
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def _losses(self, images: Sequence[Tensor], ground_truth: GroundTruth) -> dict[str, Tensor]:
        batch, sizes = self.preprocessor(images)
        features = self._pyramid(batch)
        proposals, losses = self.rpn(features, sizes, ground_truth)
        losses |= self.head.losses(pooling_format(features), proposals, ground_truth)
        return reduce_losses(losses, self.settings.trunk.loss_mean)

    def _detections(self, images: Sequence[Tensor]) -> Detections:
        return self.detect_batch(*self.preprocessor(images))

    def detect_batch(self, batch: Tensor, sizes: Tensor) -> Detections:
        """Detections, in any order, in a batch that the preprocessor has made.

        Args:
            batch: (B, 3, H, W) normalized images; H and W are multiples of 32.
            sizes: (B, 2) int64, height and width of the images in the batch.
        """
        features = self._pyramid(batch)
        check_output("backbone", self.backbone, *features)
        proposals, _ = self.rpn(features, sizes)
        detections = self.head.detect(pooling_format(features), proposals)
        check_output("head", self.head, detections.boxes, detections.scores)
        return detections

    def _pyramid(self, batch: Tensor) -> list[Tensor]:
        """P2..P6 of a batch (B, 3, H, W)."""
        return list(self.backbone(batch.contiguous(memory_format=torch.channels_last)).values())


def _per_image(detections: Detections, num_images: int) -> list[dict[str, Tensor]]:
    """One dict per image, best score first. The host waits for the device unless it knows how many there are."""
    order = detections.scores.argsort(descending=True, stable=True)
    # Rows that are not valid come last.
    images = detections.images.masked_fill(~detections.valid, num_images)
    order = order[images[order].argsort(stable=True)]
    counts = detections.counts
    if counts is None:
        counts = tuple(read(count_per_image(images, num_images + 1)).tolist()[:num_images])
    parts = order[: sum(counts)].split(counts)
    columns = {name: getattr(detections, name) for name in ("boxes", "scores", "labels", *DETAILS)}
    return [{name: column[rows] for name, column in columns.items() if column is not None} for rows in parts]
