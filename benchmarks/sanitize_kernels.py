"""Run the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

python benchmarks/sanitize_kernels.py [--kernel NAME] [--cases N] [--kernels FOLDER]

Builds each kernel with both sanitizers, and runs the random cases of its sweep in tests/ops for each instruction set,
each in a process of its own:

- deform_conv_cpu: sides of length 0 and 1; strided, expanded and channels-last tensors; offsets that are not finite.
- nms_cpu: 0 to 2500 boxes; boxes and scores that are not finite; strided tensors; two threads.
- normalize_cpu: images of 0 to 210,000 pixels with arbitrary strides; results inside larger tensors; two threads.
- winograd_cpu: images of all sides from 1 to 13; strided tensors; two threads.

Leaks are not checked, because Python and torch do not free everything. The exit status is 1 if a sanitizer reports an
error, if a result is wrong, or if no instruction set could be tested.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cpm_rcnn.ops.kernel_build import compile_command

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = {
    "deform_conv_cpu": "deform_conv_sweep.py",
    "nms_cpu": "nms_sweep.py",
    "normalize_cpu": "normalize_sweep.py",
    "winograd_cpu": "conv3x3_sweep.py",
}
INSTRUCTION_SETS = ("default", "avx2", "avx512")
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"


def build(source: Path, library: Path) -> None:
    # The last of several levels of optimization and debug information counts.
    command = [*compile_command(["c++"], source, library), "-O1", "-g", "-fno-omit-frame-pointer"]
    command += [SANITIZERS, "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    subprocess.run(command, check=True)


def runtime(name: str) -> str:
    """Return the path of one of the compiler's libraries."""
    return subprocess.run(
        ["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def sweep(name: str, library: Path, capability: str, cases: int) -> subprocess.CompletedProcess[str]:
    environment = dict(
        os.environ,
        ATEN_CPU_CAPABILITY=capability,
        # AddressSanitizer must be loaded first, and needs the C++ library to intercept exceptions.
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:exitcode=99",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:exitcode=99",
    )
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "ops" / SWEEPS[name])]
    command += ["--library", str(library), "--cases", str(cases)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def has_bfloat16_products() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def test(kernel: str, folder: Path, cases: int) -> bool:
    """Build and run one kernel. Return whether all results are correct and no error was reported."""
    best = torch.backends.cpu.get_cpu_capability()
    available = {"AVX512": INSTRUCTION_SETS, "AVX2": INSTRUCTION_SETS[:2]}.get(best, INSTRUCTION_SETS[:1])
    passed = True
    with tempfile.TemporaryDirectory() as temporary:
        library = Path(temporary) / f"{kernel}.so"
        build(folder / f"{kernel}.cpp", library)
        print(f"built {folder.name}/{kernel}.cpp with {SANITIZERS}", flush=True)
        for capability in INSTRUCTION_SETS:
            if capability not in available:
                print(f"{capability}: not run, because this CPU does not support it")
                continue
            done = sweep(kernel, library, capability, cases)
            name = capability
            if kernel == "deform_conv_cpu" and capability == "avx512" and has_bfloat16_products():
                name += " (AVX512_BF16 in bfloat16)"
            if done.returncode:
                passed = False
                print(f"{name}: exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[:4000]}", flush=True)
            else:
                print(f"{name}: {cases} cases, all results correct, no report", flush=True)
    return passed


def main(arguments: argparse.Namespace) -> int:
    names = list(SWEEPS) if arguments.kernel is None else [arguments.kernel]
    passed = [test(name, arguments.kernels, arguments.cases) for name in names]
    return int(not all(passed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(SWEEPS), help="default: all")
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--kernels", type=Path, default=ROOT / "kernels", help="folder of the kernels' sources")
    sys.exit(main(parser.parse_args()))
