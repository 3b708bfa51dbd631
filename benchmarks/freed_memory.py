"""What keeping freed memory saves in a training step on a CPU (``cpm_rcnn.cli.memory``, Linux with glibc).

    python benchmarks/freed_memory.py [--model cpm] [--steps 4]

Each setting has a process of its own, because it cannot be taken back. They train the same model (``steps.py``) and
print the CPU seconds in the program and in the system and the page faults of a step, as medians, and the peak memory.
"""

import argparse
import resource
import statistics
import subprocess
import sys

from cpm_rcnn.cli.memory import keep_freed_memory
from steps import MODELS, PEER, prepare


def measure(options: argparse.Namespace) -> None:
    """Train in this process and print a row."""
    if options.setting == "kept":
        keep_freed_memory()
    size = {"size": options.size, "batch": 1, "objects": 64, "candidates": 300}
    work = argparse.Namespace(**size, device="cpu", optimize=False, compile=False)
    step, _, _ = prepare(options.model, work)
    rows = []
    for _ in range(options.steps + 1):
        before = resource.getrusage(resource.RUSAGE_SELF)
        step()
        after = resource.getrusage(resource.RUSAGE_SELF)
        names = ("ru_utime", "ru_stime", "ru_minflt")
        rows.append([getattr(after, name) - getattr(before, name) for name in names])
    user, system, faults = (statistics.median(column) for column in zip(*rows[1:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.setting:>10} {user:>12.2f} {system:>12.2f} {faults:>12.0f} {peak:>12.0f}")


def main() -> None:
    """Start a process for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, PEER], default="cpm")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1216], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--setting", choices=("returned", "kept"), help="measure in this process")
    options = parser.parse_args()
    if options.setting is not None:
        measure(options)
        return
    print(f"{'memory':>10} {'program, s':>12} {'system, s':>12} {'page faults':>12} {'peak, MB':>12}", flush=True)
    for setting in ("returned", "kept"):
        subprocess.run([sys.executable, *sys.argv, "--setting", setting], check=True)


if __name__ == "__main__":
    main()
