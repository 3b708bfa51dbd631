"""Detect in an image with numpy, Pillow and onnxruntime only.

python run_onnx.py FILE.onnx IMAGE [MIN_SCORE]
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["detector.json"])
image = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")

# The size that the network should see, and a batch of one image whose sides are multiples of 32.
scale = 1.0
if about["short_side"] is not None:
    scale = min(about["short_side"] / min(image.size), about["max_size"] / max(image.size))
width, height = (max(round(side * scale), 1) for side in image.size)
resized = image.resize((width, height), Image.Resampling.BILINEAR)
rows, columns = (-(-side // about["multiple"]) * about["multiple"] for side in (height, width))
batch = np.zeros((1, 3, rows, columns), np.uint8)
batch[0, :, :height, :width] = np.asarray(resized).transpose(2, 0, 1)

inputs = {"images": batch, "sizes": np.array([[height, width]], np.int64)}
boxes, scores, labels, _ = session.run(["boxes", "scores", "labels", "counts"], inputs)
boxes = boxes * np.tile([image.width / width, image.height / height], 2)

# Without MIN_SCORE, the score of the best F1 of each class in the last validation, or 0.3 if the file has none.
best = about["score_thresholds"].get("best_f1", [None] * len(about["classes"]))
least = [0.3 if score is None else score for score in best]
if len(sys.argv) > 3:
    least = [float(sys.argv[3])] * len(about["classes"])
for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
    if score >= least[label - 1]:
        print(json.dumps({"class": about["classes"][label - 1], "score": score, "box": box}))
