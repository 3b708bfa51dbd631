"""Draw the heatmaps behind the best detection of an image, one row per grid stage.

python docs/examples/draw_heatmaps.py CHECKPOINT IMAGE OUT.png
"""

import sys

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

import cpm_rcnn
from cpm_rcnn.boxes import CONTINUOUS
from cpm_rcnn.inference.images import to_image


def seen_by_stages(detector: cpm_rcnn.Detector, image: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """The image at network size, and per stage the RoI (4,), its refined box (4,) and its heatmaps (9, 28, 28).

    They are those of the detection with the best score.
    """
    stages = detector.model.head.stages
    calls = []
    hooks = [
        stage.register_forward_hook(lambda stage, inputs, output: calls.append((stage, inputs[1], output)))
        for stage in stages
    ]
    resized = detector.resize(image)
    with torch.inference_mode():
        (found,) = detector.model([resized])
    for hook in hooks:
        hook.remove()
    boxes = [stage.decode(output, rois).boxes for stage, rois, output in calls]
    # A row of the stages is one object.
    row = CONTINUOUS.iou(boxes[-1], found["boxes"][0]).argmax()
    rows = [(rois.boxes[row], box[row], output.heatmaps[row]) for (_, rois, output), box in zip(calls, boxes)]
    return resized, rows


def draw(image: Tensor, rows: list[tuple[Tensor, Tensor, Tensor]], ratios: list[float], path: str) -> None:
    """One row per stage: RoI (dashed), refined box and the region of the heatmaps, then the nine heatmaps."""
    figure = plt.figure(figsize=(8, 3.6 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 2, width_ratios=[1, 1], squeeze=False)
    for (left, right), (roi, box, heatmaps), ratio in zip(parts, rows, ratios):
        axes = left.subplots()
        axes.imshow(image.permute(1, 2, 0).numpy())
        for corners, style in ((roi, "--"), (box, "-")):
            x1, y1, x2, y2 = corners.tolist()
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ls=style, ec="tab:orange", lw=2))
        x1, y1, x2, y2 = roi.tolist()
        width, height = (x2 - x1) * (1 + ratio), (y2 - y1) * (1 + ratio)
        x, y = (x1 + x2 - width) / 2, (y1 + y2 - height) / 2
        axes.add_patch(Rectangle((x, y), width, height, fill=False, ec="white", lw=1))
        axes.set(
            xlim=(x - width / 8, x + width * 9 / 8), ylim=(y + height * 9 / 8, y - height / 8), xticks=[], yticks=[]
        )
        axes.set_title(f"mapping ratio {ratio:g}")
        grid = right.subplots(3, 3)
        # The points are in the order of columns.
        for each, heatmap in zip(grid.T.flat, heatmaps.sigmoid()):
            each.imshow(heatmap.numpy(), vmin=0, vmax=1)
            each.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=72)


if __name__ == "__main__":
    checkpoint, source, out = sys.argv[1:]
    detector = cpm_rcnn.load(checkpoint)
    image, rows = seen_by_stages(detector, to_image(source, source))
    draw(image, rows, [stage.settings.mapping_ratio for stage in detector.model.head.stages], out)
