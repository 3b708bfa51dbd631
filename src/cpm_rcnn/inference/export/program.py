"""The whole detector as one graph of tensor operations, for images of any size and batches of any length."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes
from torch.overrides import TorchFunctionMode

from cpm_rcnn.models.detector import TwoStageDetector

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels", "counts")
# Sides of the batch are multiples of this number of pixels.
MULTIPLE = 32
# An example for the tracer; files run with other sizes. A side of one cell at some level could be taken for a constant.
_EXAMPLE = (2, 3, 96, 128)
_MAX_SIDE = 1 << 14


class BatchDetector(nn.Module):
    """A detector whose inputs and outputs are tensors.

    Args:
        model: a model in eval mode.
    """

    def __init__(self, model: TwoStageDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detect objects in a batch.

        Args:
            images: (B, 3, H, W) uint8, RGB, at the size that the network should see. H and W are multiples of 32. Each
                image is at the top left, and what is next to it has no effect.
            sizes: (B, 2) int64, height and width of the images in pixels.

        Returns:
            The detections of all images: those of the first image, best score first, then those of the second image,
            and so on. ``boxes`` (D, 4) float32, xyxy pixels of ``images``; ``scores`` (D,) float32; ``labels`` (D,)
            int64 in 1..C; ``counts`` (B,) int64, the number of detections of each image.
        """
        found = self.model.detect_batch(self.model.preprocessor.stacked(images, sizes), sizes)
        batch = images.shape[0]
        order = found.scores.argsort(descending=True, stable=True)
        order = order[found.images[order].argsort(stable=True)]
        rows = order[found.valid[order].nonzero().squeeze(1)]
        counts = (found.images[rows, None] == torch.arange(batch)).sum(dim=0)
        return found.boxes[rows], found.scores[rows], found.labels[rows], counts


@torch.no_grad()
def trace(model: TwoStageDetector, replacements: Mapping[Any, Callable[..., Any]] | None = None) -> ExportedProgram:
    """The graph of a detector with float32 weights, on the CPU; batch, height and width are symbols.

    The model is not changed.

    Args:
        model: the model.
        replacements: functions that are traced in the place of operators. Without one for it, the graph contains the
            operator ``cpm_rcnn::nms_mask``, which only this package has.
    """
    model = copy.deepcopy(model)
    model.optimize()
    batch = Dim("batch")
    height, width = (MULTIPLE * Dim(name, max=_MAX_SIDE // MULTIPLE) for name in ("rows", "columns"))
    images = torch.zeros(_EXAMPLE, dtype=torch.uint8)
    sizes = torch.tensor([_EXAMPLE[2:]]).repeat(_EXAMPLE[0], 1)
    # As torch.onnx does it: a graph for a batch of one image too.
    with symbolic_shapes.patch(backed_size_oblivious=True), _Replace(replacements or {}):  # type: ignore[attr-defined]
        return torch.export.export(
            BatchDetector(model).eval(),
            (images, sizes),
            dynamic_shapes={"images": {0: batch, 2: height, 3: width}, "sizes": {0: batch}},
            strict=False,
            # Conditions on sizes become assertions in the graph instead of errors of the tracer.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


class _Replace(TorchFunctionMode):
    """Calls functions in the place of operators."""

    def __init__(self, replacements: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.replacements.get(func, func)(*args, **(kwargs or {}))
