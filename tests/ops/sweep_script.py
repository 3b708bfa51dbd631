"""What the scripts of random cases, ``*_sweep.py``, have in common."""

import argparse
import os
import subprocess
import sys

import torch


def main(description, load_kernel, find_failures, cases):
    """Run the command line of a script.

    ``find_failures`` takes the number of cases, and returns how many it has run and one line for each wrong result.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="the compiled kernel to test; default: the one in the package")
    parser.add_argument("--cases", type=int, default=cases)
    options = parser.parse_args()
    if options.library:
        torch.ops.load_library(options.library)
    else:
        assert load_kernel()
    count, failures = find_failures(options.cases)
    for line in failures[:20]:
        print(line)
    print(f"{torch.backends.cpu.get_cpu_capability()}: {count} cases, {len(failures)} wrong results")
    raise SystemExit(bool(failures))


def check_other_instruction_sets(script, cases):
    """Run a script once for each instruction set but the best one, which the other tests use."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    command = [sys.executable, script, "--cases", str(cases)]
    runs = [
        subprocess.Popen(command, env=dict(os.environ, ATEN_CPU_CAPABILITY=name), stdout=subprocess.PIPE, text=True)
        for name in ("default", "avx2")
        if name != best
    ]
    for run in runs:
        output = run.communicate()[0]
        assert run.returncode == 0, output
