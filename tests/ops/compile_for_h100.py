"""Compile the Triton kernels for an H100, on the shapes of X-101's C3 and in each dtype, and print the results as JSON.

This is a separate program because Triton reads TRITON_INTERPRET, which selects its interpreter instead of its compiler,
when it is imported.
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cpm_rcnn.kernels import deform_conv_triton as kernels

NARROW = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SUMS = ("grad_input", "grad_offset", "grad_mask", "partial")


def compiled(function, dtype):
    given = [
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((1, 512, 100, 168), (1, 18, 100, 168), (512, 8, 3, 3))
    ]
    constants = kernels.Plan(*given).constants((1, 1), (1, 1), (1, 1))
    constants |= {"HAS_MASK": True, "PRECISION": "ieee", "NEEDS_INPUT": True}
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    kinds = {"pixels": "i32", "blocks": "i32"} | dict.fromkeys(SUMS, "*fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, NARROW[dtype]) for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    return triton.compile(ASTSource(function, signature, places, aligned), target=GPUTarget("cuda", 90, 32)).asm


if __name__ == "__main__":
    results = []
    for function in (kernels._forward, kernels._backward_data, kernels._backward_weight):
        for dtype in NARROW:
            asm = compiled(function, dtype)
            results.append(
                {
                    "kernel": function.__name__,
                    "dtype": str(dtype),
                    "bytes": len(asm["cubin"]),
                    "tensor_cores": "mma" in asm["ptx"],
                    "vector_atomics": ".add.v4.f32" in asm["ptx"] or ".v4.f32.add" in asm["ptx"],
                }
            )
    print(json.dumps(results))
