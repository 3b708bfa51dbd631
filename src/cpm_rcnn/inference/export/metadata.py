"""What an exported file says about its detector."""

import json
from importlib.metadata import version
from math import isinf

from cpm_rcnn.inference.detector import Detector
from cpm_rcnn.inference.export.program import MULTIPLE

# Name of the metadata property of an ONNX file, and of the extra file in a ``.pt2`` file.
METADATA_KEY = "detector.json"


def metadata(detector: Detector) -> str:
    """The metadata as JSON: classes, score thresholds, and the size of the images that the network should see."""
    thresholds = {}
    if detector.operating_points is not None:
        kinds = ["best_f1"] + ["precision"] * (detector.operating_points["target_precision"] is not None)
        thresholds = {kind: [None if isinf(x) else x for x in detector.thresholds(kind)] for kind in kinds}
    return json.dumps(
        {
            "program": f"cpm-rcnn {version('cpm-rcnn')}",
            "classes": detector.class_names,  # of labels 1, 2, ...
            "category_ids": [category["id"] for category in detector.categories],
            "score_thresholds": thresholds,
            "short_side": detector.short_side,
            "max_size": detector.max_size,
            "multiple": MULTIPLE,
            "box_convention": detector.convention.name,
            "model": detector.model.settings.to_options(),
        }
    )
