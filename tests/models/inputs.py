"""Small inputs that several tests of the model share."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.models.heads import HeadInputs
from cpm_rcnn.models.structures import GroundTruth, Rois

# Of P2..P5, the levels that heads pool from.
STRIDES = (4, 8, 16, 32)


def random_image(height, width, seed=0):
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_pyramid(batch=2, channels=8, size=128, strides=STRIDES, seed=1):
    """Feature maps of square images with ``size`` pixels per side."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, size // stride, size // stride, generator=generator) for stride in strides]


def random_rois(count, images, generator, size=100.0):
    corner = torch.rand(count, 2, generator=generator) * size
    boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * size / 2], dim=1)
    return Rois.of(boxes, torch.randint(images, (count,), generator=generator))


def no_rois():
    return Rois.of(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def make_target(*boxes, labels=None):
    """A target with ``boxes``, labelled 1, 2, ... unless ``labels`` are given."""
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(list(labels or range(1, len(boxes) + 1)), dtype=torch.int64),
    }


def make_ground_truth(*boxes_per_image):
    return GroundTruth.stack([make_target(*boxes) for boxes in boxes_per_image])


# The objects of two images.
OBJECTS = torch.tensor([[10.0, 10, 50, 60], [60, 50, 110, 100]]), torch.tensor([[30.0, 30, 90, 90]])


def two_images():
    """The ground truth of two images with three objects, labelled 1, 2 and 3."""
    return GroundTruth.stack(
        [make_target(*OBJECTS[0].tolist(), labels=[1, 2]), make_target(*OBJECTS[1].tolist(), labels=[3])]
    )


def proposals_of_two_images(image_sizes=None, reach=80):
    """20 boxes per image near its objects, and 20 that begin in its first ``reach`` pixels."""
    generator = torch.Generator().manual_seed(2)
    boxes = []
    for objects in OBJECTS:
        near = objects.repeat(20, 1)[:20] + 6 * torch.randn(20, 4, generator=generator)
        corner = reach * torch.rand(20, 2, generator=generator)
        boxes += [near, torch.cat([corner, corner + 10 + 30 * torch.rand(20, 2, generator=generator)], dim=1)]
    return Rois.of(torch.cat(boxes), torch.arange(2).repeat_interleave(40), image_sizes)


def head_inputs(channels=8, num_classes=3):
    return HeadInputs(channels, STRIDES, num_classes, CONTINUOUS)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that was computed."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            # Expanded tensors have no memory of their own.
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, value.numel())
        return result
