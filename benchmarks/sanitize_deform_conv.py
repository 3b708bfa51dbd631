"""Run the deformable convolution's CPU kernel under AddressSanitizer and UndefinedBehaviorSanitizer.

python benchmarks/sanitize_deform_conv.py [--cases N] [--kernels FOLDER]

Builds the kernel with both sanitizers, and runs the random cases of tests/ops/deform_conv_sweep.py (sides of length 0
and 1; strided, expanded and channels-last tensors; offsets that are not finite) for each instruction set, each in a
process of its own. Leaks are not checked, because Python and torch do not free everything. The exit status is 1 if a
sanitizer reports an error, if a result is wrong, or if no instruction set could be tested.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "tests" / "ops" / "deform_conv_sweep.py"
INSTRUCTION_SETS = ("default", "avx2", "avx512")
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"


def build(kernels: Path, library: Path) -> None:
    command = ["c++", "-shared", "-fPIC", "-std=c++20", "-O1", "-g", "-fopenmp", "-fno-omit-frame-pointer"]
    command += [SANITIZERS, "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    command += [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command += [str(kernels / "deform_conv_cpu.cpp"), "-o", str(library), "-lc10", "-ltorch_cpu", "-ltorch"]
    subprocess.run(command, check=True)


def runtime(name: str) -> str:
    """Return the path of one of the compiler's libraries."""
    return subprocess.run(
        ["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def sweep(library: Path, capability: str, cases: int) -> subprocess.CompletedProcess[str]:
    environment = dict(
        os.environ,
        ATEN_CPU_CAPABILITY=capability,
        # AddressSanitizer must be loaded first, and needs the C++ library to intercept exceptions.
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:exitcode=99",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:exitcode=99",
    )
    command = [sys.executable, "-W", "ignore", str(SWEEP), "--library", str(library), "--cases", str(cases)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def has_bfloat16_products() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def main(arguments: argparse.Namespace) -> int:
    best = torch.backends.cpu.get_cpu_capability()
    available = {"AVX512": INSTRUCTION_SETS, "AVX2": INSTRUCTION_SETS[:2]}.get(best, INSTRUCTION_SETS[:1])
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "deform_conv_cpu.so"
        build(arguments.kernels, library)
        print(f"built {arguments.kernels.name}/deform_conv_cpu.cpp with {SANITIZERS}", flush=True)
        for capability in INSTRUCTION_SETS:
            if capability not in available:
                print(f"{capability}: not run, because this CPU does not support it")
                continue
            done = sweep(library, capability, arguments.cases)
            name = capability
            if capability == "avx512" and has_bfloat16_products():
                name += " (AVX512_BF16 in bfloat16)"
            if done.returncode:
                failed = True
                print(f"{name}: exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[:4000]}", flush=True)
            else:
                print(f"{name}: {arguments.cases} cases, all results correct, no report", flush=True)
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--kernels", type=Path, default=ROOT / "kernels", help="folder of the kernel's sources")
    sys.exit(main(parser.parse_args()))
