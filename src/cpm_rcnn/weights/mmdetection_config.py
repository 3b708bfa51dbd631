"""The configuration that mmdetection stores in its files, read without executing it."""

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpm_rcnn.errors import UserError
from cpm_rcnn.models.backbones.input_format import InputFormat
from cpm_rcnn.weights.reading import InertObject

# Longer texts are not parsed.
_LONGEST_TEXT = 10**6


@dataclass(frozen=True)
class MMDetectionConfig:
    """What a file's configuration says about its model.

    Attributes:
        content: the configuration as plain values; empty if the file has none or it cannot be read.
        classes: names of the classes; None if the file does not name them.
    """

    content: dict[str, Any]
    classes: list[str] | None

    @classmethod
    def of(cls, meta: Any) -> "MMDetectionConfig":
        """The configuration in the ``meta`` entry of a file of mmdetection 2.x (``config``) or 3.x (``cfg``)."""
        meta = meta if isinstance(meta, Mapping) else {}
        config = next((found for key in ("cfg", "config") if (found := _plain_config(meta.get(key)))), {})
        data_set = meta.get("dataset_meta")
        entries = [*(data_set.items() if isinstance(data_set, Mapping) else ()), *meta.items()]
        classes = next((value for key, value in entries if str(key).lower() == "classes"), None)
        if isinstance(classes, str):
            classes = [classes]
        named = isinstance(classes, Sequence) and len(classes) > 0 and all(isinstance(name, str) for name in classes)
        return cls(config, list(classes) if named else None)  # type: ignore[arg-type]

    @property
    def input_format(self) -> InputFormat | None:
        """The input format; None if the configuration does not state it."""
        for node in _mappings([self._get("model", "data_preprocessor"), self._get("img_norm_cfg"), self.content]):
            mean, std = (_numbers(node.get(key), 3) for key in ("mean", "std"))
            if mean is not None and std is not None and min(std) > 0:
                # The preprocessor of 3.x and the transform of 2.x have different defaults.
                rgb = node.get("bgr_to_rgb", node.get("to_rgb", node.get("type") != "DetDataPreprocessor"))
                return InputFormat(
                    "rgb" if rgb else "bgr", 1, mean, std, self._get("model", "backbone", "style") == "caffe"
                )
        return None

    def target_stds(self, stage: int | None) -> tuple[float, ...] | None:
        """``target_stds`` of a stage of a cascade, or of the only box head; None if it is not stated."""
        heads = self._get("model", "roi_head", "bbox_head")
        if stage is not None:
            heads = heads[stage] if isinstance(heads, Sequence) and len(heads) > stage else None
        if not isinstance(heads, Mapping):
            return None
        coder = heads.get("bbox_coder")
        stds = _numbers(coder.get("target_stds"), 4) if isinstance(coder, Mapping) else None
        return tuple(stds) if stds and min(stds) > 0 else None

    def check_anchors(self, source: str) -> None:
        """Raise :class:`UserError` unless the anchors are those of the model zoo, or not stated."""
        generator = self._get("model", "rpn_head", "anchor_generator")
        generator = generator if isinstance(generator, Mapping) else {}
        expected = {"scales": [8], "ratios": [0.5, 1.0, 2.0], "strides": [4, 8, 16, 32, 64], "center_offset": 0.0}
        for name, value in expected.items():
            given = generator.get(name, value)
            given = list(given) if isinstance(given, tuple) else given
            if given != value:
                raise UserError(f"{source}: its anchors have {name}={given}; only {value} can be converted")

    def test_options(self) -> dict[str, Any]:
        """The options of the test that the configuration states."""
        rcnn, nms = self._test("rcnn"), self._test("rcnn", "nms")
        limit = rcnn.get("max_per_img")
        options = {
            "score_threshold": rcnn.get("score_thr"),
            "nms_iou": nms.get("iou_threshold", nms.get("iou_thr")),
            "max_detections": limit if limit != -1 else None,
        }
        rpn = self._test("rpn")
        if rpn.get("nms_pre") == rpn.get("max_per_img", rpn.get("max_num")):
            options["proposals_test"] = rpn.get("nms_pre")
        return {name: value for name, value in options.items() if value is not None}

    def differences(self) -> list[str]:
        """What the configuration states and this project does differently, one line each."""
        notes = []
        rpn = self._test("rpn")
        counts = rpn.get("nms_pre"), rpn.get("max_per_img", rpn.get("max_num"))
        if None not in counts and counts[0] != counts[1]:
            notes.append(f"the file's RPN keeps {counts[0]} proposals per level and {counts[1]} per image; here 1000")
        kind = self._test("rcnn", "nms").get("type", "nms")
        if kind != "nms":
            notes.append(f"the file's configuration uses {kind}; this project uses nms")
        extractors = self._get("model", "roi_head", "bbox_roi_extractor")
        for node in _mappings([extractors]):
            ratio = node.get("sampling_ratio", node.get("sample_num", 0))
            if ratio != 0:
                notes.append(f"the file's RoIAlign has sampling_ratio={ratio}; here it is 0, so boxes differ a little")
                break
        return notes

    def _get(self, *keys: str) -> Any:
        value: Any = self.content
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def _test(self, *keys: str) -> Mapping[str, Any]:
        """An entry of ``test_cfg``, which is part of ``model`` since mmdetection 2.7."""
        for prefix in (("model", "test_cfg"), ("test_cfg",)):
            value = self._get(*prefix, *keys)
            if isinstance(value, Mapping):
                return value
        return {}


def _plain_config(value: Any) -> dict[str, Any]:
    """A configuration as plain values, from its text, from a mapping, or from an object that contains either."""
    if isinstance(value, str):
        return _evaluated(value)
    if isinstance(value, Mapping):
        return dict(value) if "model" in value else {}
    if isinstance(value, InertObject):
        parts = [*value.arguments, *(value.state if isinstance(value.state, tuple) else (value.state,))]
        return next((found for part in parts if (found := _plain_config(part))), {})
    return {}


def _evaluated(text: str) -> dict[str, Any]:
    """The assignments in a configuration's text whose values are literals or ``dict(...)``; others are left out.

    mmdetection 2.0 stores the texts of all files that a configuration is composed of, each after a line with its name.
    Later ones change single entries of earlier ones.
    """
    if len(text) > _LONGEST_TEXT:
        return {}
    content: dict[str, Any] = {}
    try:
        for statement in ast.parse(re.sub(r"^\S+\.py$", "", text, flags=re.MULTILINE)).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name = statement.targets[0].id
                content[name] = _merged(content.get(name), _literal(statement.value))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return content


def _merged(old: Any, new: Any) -> Any:
    """The entries of ``old`` changed by those of ``new``, as in mmdetection's configurations."""
    if not isinstance(old, dict) or not isinstance(new, dict) or new.get("_delete_"):
        return new
    return old | {name: _merged(old.get(name), value) for name, value in new.items()}


def _literal(node: ast.expr) -> Any:
    """The value of a literal or of a call of ``dict``; None for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        return {key.value: _literal(v) for key, v in zip(node.keys, node.values) if isinstance(key, ast.Constant)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = node.operand.value
        return -value if isinstance(value, (int, float)) else None
    return node.value if isinstance(node, ast.Constant) else None


def _mappings(values: Any, depth: int = 20) -> Iterator[Mapping[str, Any]]:
    """All mappings inside nested lists and mappings, outer ones first."""
    if isinstance(values, Mapping):
        yield values
        values = list(values.values())
    if isinstance(values, (list, tuple)) and depth:
        for value in values:
            yield from _mappings(value, depth - 1)


def _numbers(value: Any, length: int) -> tuple[float, ...] | None:
    """A list of ``length`` finite numbers as floats; None for anything else."""
    if not isinstance(value, (list, tuple)) or len(value) != length:
        return None
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) for x in value):
        return None
    return tuple(float(x) for x in value)
