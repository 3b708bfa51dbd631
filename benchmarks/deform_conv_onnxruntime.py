"""Forward time of this project's deformable convolution on a CPU beside ONNX Runtime's DeformConv, in one run.

    pip install onnx onnxruntime
    python benchmarks/deform_conv_onnxruntime.py [--threads 1]

The shapes are those of X-101 (``benchmarks/deform_conv.py``), one image, stride 1, float32. Both take turns; the times
are medians, and the ratio is the median of the ratios within a round. The outputs are compared first.
"""

import argparse
import statistics
import time
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from cpm_rcnn.ops import deform_conv2d
from deform_conv import GROUPS, LAYERS, Case, make


def session(shapes: dict[str, list[int]], output: list[int], threads: int) -> onnxruntime.InferenceSession:
    """A graph of one DeformConv with these inputs."""
    inputs = ["input", "weight", "offset", ""] + ["mask"] * ("mask" in shapes)
    attributes: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": GROUPS, "offset_group": 1}
    node = helper.make_node("DeformConv", inputs, ["output"], **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, output)
    graph = helper.make_graph([node], "deform_conv", values, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def milliseconds(work: Any) -> float:
    """The time of one call."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print one line per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, {options.threads} threads")
    print("| layer | | onnxruntime ms | ours ms | ratio |\n|---|---|---|---|---|")
    for layer in LAYERS:
        for masked in (False, True):
            tensors, grad = make(Case(layer, 1, 1, masked), "cpu", torch.float32)
            named = dict(zip(("input", "offset", "weight", "mask"), tensors))
            given = {name: value.detach() for name, value in named.items() if value is not None}
            shapes = {name: list(value.shape) for name, value in given.items()}
            peer = session(shapes, list(grad.shape), options.threads)
            arrays = {name: value.numpy() for name, value in given.items()}

            def ours(given: dict[str, torch.Tensor] = given) -> torch.Tensor:
                return deform_conv2d(given["input"], given["offset"], given["weight"], None, 1, 1, 1, given.get("mask"))

            def theirs(peer: Any = peer, arrays: dict[str, Any] = arrays) -> Any:
                return peer.run(None, arrays)[0]

            torch.testing.assert_close(ours(), torch.from_numpy(theirs()), rtol=1e-3, atol=1e-3)
            times = [(milliseconds(theirs), milliseconds(ours)) for _ in range(options.rounds)]
            peer_time, own_time = (statistics.median(column) for column in zip(*times))
            ratio = statistics.median(one / two for one, two in times)
            version = "v2" if masked else "v1"
            print(f"| {layer} | {version} | {peer_time:.1f} | {own_time:.1f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
