"""Compile the Triton kernels of the non-maximum suppression for an H100, and print the results as JSON.

This is a separate program because Triton reads TRITON_INTERPRET, which selects its interpreter instead of its compiler,
when it is imported.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cpm_rcnn.kernels import nms_triton as kernels

KINDS = {"groups": "*i64", "bits": "*i64", "kept": "*i8", "first": "i32", "last": "i32", "pitch": "i32"}
CONSTANTS = {"BLOCK": kernels._BLOCK, "CHUNK": 1024}


def compiled(function, dtype):
    names = function.arg_names
    constants = {name: value for name, value in CONSTANTS.items() if name in names}
    if function is kernels._remove_by_earlier:
        constants["CHUNK"] = kernels._REMOVE_CHUNK
    kinds = KINDS | dict.fromkeys(constants, "constexpr") | dict.fromkeys(("boxes", "threshold"), f"*{dtype}")
    signature = {name: kinds[name] for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(function, signature, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm


if __name__ == "__main__":
    results = []
    for function in (kernels._remove_by_earlier, kernels._find_bits, kernels._scan):
        for dtype in ("fp32", "fp64") if "boxes" in function.arg_names else ("fp32",):
            asm = compiled(function, dtype)
            results.append(
                {
                    "kernel": function.__name__,
                    "dtype": dtype,
                    "bytes": len(asm["cubin"]),
                    "fused": len(re.findall(r"\bfma\.", asm["ptx"])),
                    "divisions": sorted(set(re.findall(r"\bdiv\.[a-z0-9.]*f(?:32|64)", asm["ptx"]))),
                }
            )
    print(json.dumps(results))
