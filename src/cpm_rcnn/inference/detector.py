"""Detection in images of any size, with results in pixels of the original images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cpm_rcnn.boxes import CONVENTIONS, BoxConvention
from cpm_rcnn.data.settings import check_tile, check_tile_overlap
from cpm_rcnn.data.transforms import network_size
from cpm_rcnn.errors import ArgumentError, UserError, check_choice, check_count, check_range
from cpm_rcnn.inference.image_detections import COLUMNS, ImageDetections
from cpm_rcnn.inference.images import to_image
from cpm_rcnn.inference.multi_scale import MultiScaleDetector, MultiScaleSettings
from cpm_rcnn.inference.tiles import TiledDetector
from cpm_rcnn.inference.to_host import to_host
from cpm_rcnn.models.detector import TwoStageDetector
from cpm_rcnn.models.host import from_host, requirements_deferred

# The options of the data module that set the size of images and their tiles at test.
SIZE_OPTIONS = ("test_short_side", "test_max_size", "tile", "tile_overlap")


def size_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`Detector` that are options of a data module, from those that are present."""
    return {name.removeprefix("test_"): data[name] for name in SIZE_OPTIONS if name in data}


class Detector:
    """A model with its classes and test-time image size; :func:`cpm_rcnn.load` makes one from a checkpoint.

    Args:
        model: the model.
        categories: the classes 1..C, each a mapping with ``id`` and ``name``.
        short_side: length in pixels to which the shorter side of an image is resized; None keeps the original size.
        max_size: maximum length in pixels of the longer side; it takes precedence over ``short_side``. Not used
            if ``short_side`` is None.
        tile: side in pixels of the tiles into which larger images are cut
            (:class:`~cpm_rcnn.inference.tiles.TiledDetector`). Each tile is resized as an image is otherwise. None
            detects in whole images.
        tile_overlap: smallest overlap of neighboring tiles, as a part of their sides.
        multi_scale: settings of the multi-scale test; its scales are factors of ``short_side``.
        operating_points: score thresholds of each class for these weights, as
            :func:`~cpm_rcnn.evaluation.operating_points.operating_points` returns them; None if they are not known.

    Raises:
        ArgumentError: a length or the overlap is invalid; named as in the data module, such as ``test_short_side``.

    Attributes:
        model: the bare ``nn.Module``, which takes resized uint8 images and returns one dict per image.
        categories: a copy of the argument.
        operating_points: the argument. From a checkpoint, they are those of the validation of its weights, with its
            test-time settings.
        class_names: names of the classes 1..C.
        convention: the box coordinate convention of the results.
    """

    def __init__(
        self,
        model: TwoStageDetector,
        categories: Sequence[Mapping[str, Any]],
        *,
        short_side: int | None = 800,
        max_size: int = 1333,
        tile: int | None = None,
        tile_overlap: float = 0.2,
        multi_scale: MultiScaleSettings | None = None,
        operating_points: Mapping[str, Any] | None = None,
    ) -> None:
        if short_side is not None:
            check_count("test_short_side", short_side)
        check_count("test_max_size", max_size)
        check_tile("tile", tile)
        check_tile_overlap("tile_overlap", tile_overlap)
        self.model = model
        self.categories = [dict(category) for category in categories]
        self.short_side = short_side
        self.max_size = max_size
        self.tile = tile
        self.tile_overlap = tile_overlap
        self.multi_scale = multi_scale
        self.operating_points = operating_points
        if multi_scale is not None and short_side is None:
            raise ArgumentError("test_short_side", "=null: the multi-scale test needs a size that its scales refer to")

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 1..C."""
        return [category["name"] for category in self.categories]

    @property
    def convention(self) -> BoxConvention:
        """The box coordinate convention of the results."""
        return CONVENTIONS[self.model.settings.trunk.convention]

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def thresholds(self, kind: str = "best_f1") -> list[float]:
        """The score threshold of each class 1..C at one of its operating points.

        Args:
            kind: ``best_f1``, or ``precision`` for the lowest threshold that has reached the target precision.

        Returns:
            C thresholds; infinity for classes that have no such point.

        Raises:
            UserError: the detector has no operating points of this kind.
        """
        check_choice("kind", kind, ("best_f1", "precision"))
        if self.operating_points is None:
            raise UserError("the detector has no operating points")
        if kind == "precision" and self.operating_points["target_precision"] is None:
            raise UserError("the operating points have no target precision")
        by_id = {each["id"]: each[kind] for each in self.operating_points["classes"].values()}
        points = [by_id.get(category["id"]) for category in self.categories]
        return [inf if point is None else point["threshold"] for point in points]

    def to(self, device: torch.device | str) -> "Detector":
        """Move the model to a device."""
        self.model.to(device)
        return self

    def optimize(self, dtype: torch.dtype = torch.float32, compile: bool = False) -> "Detector":
        """Make inference faster. The model cannot be trained afterwards, and its ``state_dict`` has other names.

        Frozen BatchNorm is folded into the weights of the convolutions once.

        Args:
            dtype: ``torch.float32`` gives the same detections up to rounding. With ``torch.bfloat16``, convolutions and
                linear layers have weights and activations in bfloat16, as with ``trainer.precision=bf16-mixed``, but
                weights are converted once. Pooling, softmax and sigmoid, box and heatmap decoding, NMS and scores stay
                in float32. It is faster on GPUs and on CPUs with AVX512_BF16 or AMX.
            compile: whether the layers are compiled with ``torch.compile``, at the first image. A second size of images
                compiles them again, for any size.

        Returns:
            This detector. A second call with the same arguments changes nothing.

        Raises:
            ArgumentError: another dtype, or float32 although the weights have been converted to bfloat16.
        """
        self.model.optimize(dtype, compile)
        return self

    def detect(
        self,
        images: Iterable[Any],
        *,
        batch_size: int = 1,
        score_threshold: float | Sequence[float] = 0.0,
        details: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> list[ImageDetections]:
        """Detect objects in images of any size.

        Args:
            images: paths, PIL images, uint8 arrays (H, W, 3) or (H, W), or uint8 tensors (3, H, W); RGB. An iterable is
                read one batch at a time. A single image is accepted too.
            batch_size: images per forward pass, or tiles. Images of one batch are padded to the same size, which can
                change the results slightly.
            score_threshold: detections with a lower score are left out. A number, or one per class 1..C, such as
                :meth:`thresholds` returns.
            details: whether the results also say how each score was computed. In the multi-scale test, this is how the
                score of the box was computed before soft-NMS.
            progress: is called after each forward pass with the number of images that are done. With tiles, it is a
                fraction.

        Returns:
            One :class:`ImageDetections` per image, on the CPU.

        Raises:
            UserError: an image cannot be read or has another type, dtype or shape; the message names the image.
        """
        check_count("batch_size", batch_size)
        self._check_threshold(score_threshold)
        if isinstance(images, (str, bytes, Tensor, np.ndarray)) or not isinstance(images, Iterable):
            images = [images]
        results: list[ImageDetections] = []

        def show(part: float) -> None:
            if progress is not None:
                progress(len(results) + part * len(tensors))

        for batch in _batches(images, batch_size):
            tensors = [to_image(value, f"images[{len(results) + i}]") for i, value in enumerate(batch)]
            resized = [self.resize(image).to(self.device, non_blocking=True) for image in tensors]
            with _eval_mode(self.model), torch.inference_mode(), requirements_deferred():
                sizes = [_size(image) for image in tensors]
                found = self.detect_resized(resized, sizes, details=details, batch_size=batch_size, progress=show)
                found = to_host(found)
            show(1)
            results += [self._result(detections, score_threshold) for detections in found]
        return results

    @property
    def takes_original_sizes(self) -> bool:
        """Whether :meth:`detect_resized` resizes the images itself: with tiles and in the multi-scale test."""
        return self.multi_scale is not None or self.tile is not None

    def resize(self, image: Tensor) -> Tensor:
        """Resize an image, uint8 (3, H, W), to the size that :meth:`detect_resized` expects."""
        return image if self.takes_original_sizes else self._resized(image)

    def detect_resized(
        self,
        images: Sequence[Tensor],
        original_sizes: Sequence[Sequence[int]],
        *,
        details: bool = False,
        batch_size: int | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detect objects in images that were resized already, for example by a data loader.

        Args:
            images: uint8 (3, h, w), resized as by :meth:`resize`, on the model's device.
            original_sizes: (height, width) of each image before it was resized.
            details: see :meth:`detect`.
            batch_size: tiles per forward pass; None: as many as there are images. Not used without tiles.
            progress: is called after each batch of tiles with the part of all tiles that is done. Not used without
                tiles.

        Returns:
            One dict per image, best score first: ``boxes`` (N, 4) in pixels of the original image, ``scores`` (N,) and
            ``labels`` (N,), and the details that are requested. They are on the model's device; those of tiles and of
            the multi-scale test are on the CPU.
        """
        find: Callable[[Sequence[Tensor]], list[dict[str, Tensor]]] = self.model
        if details:
            find = partial(self.model, details=True)
        if self.multi_scale is not None:
            assert self.short_side is not None
            find = MultiScaleDetector(find, self.multi_scale, self.convention, self.short_side)
        if self.tile is not None:
            if self.multi_scale is None:
                find = partial(self._resize_and_find, find)
            limit = getattr(self.model.settings.head, "max_detections", None)
            tiles = self.tile, self.tile_overlap
            find = TiledDetector(find, *tiles, self.convention, batch_size or len(images), limit, progress)
        return [
            found | {"boxes": _rescale(found["boxes"], _size(image), original)}
            for found, image, original in zip(find(images), images, original_sizes, strict=True)
        ]

    def _resized(self, image: Tensor) -> Tensor:
        """An image, uint8 (3, H, W), in the size that the network should see."""
        if self.short_side is None:
            return image
        size = network_size(_size(image), self.short_side, self.max_size)
        return F.resize(image, list(size), antialias=True)

    def _resize_and_find(
        self, find: Callable[[Sequence[Tensor]], list[dict[str, Tensor]]], images: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """Resize images, uint8 (3, H, W), and return what ``find`` finds in pixels of the given images."""
        resized = [self._resized(image) for image in images]
        return [
            found | {"boxes": _rescale(found["boxes"], _size(small), _size(image))}
            for found, small, image in zip(find(resized), resized, images, strict=True)
        ]

    def _check_threshold(self, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            return check_range("score_threshold", value, 0, 1)
        classes = len(self.categories)
        if len(value) != classes:
            problem = f" has {len(value)} values: must be a number, or a list of one per class ({classes})"
            raise ArgumentError("score_threshold", problem)
        for each in value:
            if each != inf:
                check_range("score_threshold", each, 0, 1)

    def _result(self, found: dict[str, Tensor], threshold: float | Sequence[float]) -> ImageDetections:
        scores, labels = found["scores"], found["labels"]
        kept = scores >= (scores.new_tensor(threshold)[labels - 1] if isinstance(threshold, Sequence) else threshold)
        columns = {name: found[name][kept] for name in COLUMNS if name in found}
        categories = [self.categories[label - 1] for label in columns["labels"].tolist()]
        names, ids = ([category[key] for category in categories] for key in ("name", "id"))
        return ImageDetections(**columns, names=names, category_ids=ids, convention=self.convention)


def _rescale(boxes: Tensor, size: Sequence[int], original_size: Sequence[int]) -> Tensor:
    """Boxes (N, 4) of an image of ``size`` (h, w), in pixels of its ``original_size`` (h, w)."""
    y, x = (original / side for original, side in zip(original_size, size))
    return boxes * from_host([x, y, x, y], boxes)


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Set eval mode, and restore the previous mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
