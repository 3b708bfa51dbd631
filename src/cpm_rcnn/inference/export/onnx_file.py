"""Detectors as ONNX files of standard operators, which onnxruntime runs on a CPU."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from cpm_rcnn.errors import UserError
from cpm_rcnn.inference.export.metadata import METADATA_KEY
from cpm_rcnn.inference.export.program import INPUTS, OUTPUTS

# The first opset with DeformConv.
MIN_OPSET = 19


def write_onnx(program: ExportedProgram, path: Path, metadata: str, opset: int = MIN_OPSET) -> None:
    """Write the graph of a detector, and ``metadata`` (JSON) as the metadata property :data:`METADATA_KEY`.

    Weights are stored inside the file. ONNX limits a file to 2 GB.
    """
    from cpm_rcnn.inference.export.onnx_operators import TRANSLATIONS

    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        custom_translation_table=TRANSLATIONS,
        input_names=INPUTS,
        output_names=OUTPUTS,
        verbose=False,
        optimize=False,
    )
    assert converted is not None
    _simplify(converted.model)
    converted.model.metadata_props[METADATA_KEY] = metadata
    converted.save(path, external_data=False)


def _simplify(model: Any) -> None:
    """Apply the passes of ``torch.onnx.export(optimize=True)`` to a graph, except the rules that rewrite operators.

    The rules take ten times as long as the other passes, and onnxruntime has such rules of its own.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


class OnnxRunner:
    """Runs a file that :func:`write_onnx` wrote in onnxruntime on the CPU.

    Args:
        path: the file.
        threads: number of threads; None is that of torch.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """See :class:`~cpm_rcnn.inference.export.program.BatchDetector`."""
        inputs = dict(zip(INPUTS, (images.numpy(), sizes.numpy())))
        return tuple(torch.from_numpy(output) for output in self._session.run(OUTPUTS, inputs))


def check_onnx() -> None:
    """Raise :class:`UserError` unless the packages for ONNX are installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError:
            raise UserError(
                f"format=onnx: {name} is not installed; pip install 'cpm-rcnn[export]', or use format=pt2"
            ) from None
