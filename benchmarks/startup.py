"""Seconds until a command has printed its help or an error in its config, next to those of importing libraries.

python benchmarks/startup.py [--runs 5]
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

# The options that each command requires; without them the error would be another one.
REQUIRED = {
    "train": [],
    "eval": ["ckpt=x.ckpt"],
    "predict": ["ckpt=x.ckpt", "source=x.jpg"],
    "convert": ["src=x.pth", "dst=x.ckpt"],
    "compare": ["a", "b"],
}


def seconds(arguments: Sequence[str], runs: int, status: int = 0) -> float:
    """Median seconds of ``python ARGUMENTS``, which must end with ``status``, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        ran = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        if ran.returncode != status:
            raise SystemExit(f"python {' '.join(arguments)}: exit status {ran.returncode}\n{ran.stderr}")
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="runs per number")
    runs = parser.parse_args().runs
    print(f"Seconds, median of {runs} runs.\n")
    print("| command | `--help` | unknown option |\n|---|---:|---:|")
    for name, options in REQUIRED.items():
        module = ["-m", f"cpm_rcnn.{name}"]
        shown = seconds([*module, "--help"], runs)
        refused = seconds([*module, *options, "nosuch=1"], runs, status=2)
        print(f"| `{name}` | {shown:.2f} | {refused:.2f} |", flush=True)
    print("\n| `python -c` | seconds |\n|---|---:|")
    for code in ("pass", "import cpm_rcnn", "import hydra", "import torch", "import pytorch_lightning"):
        print(f"| `{code}` | {seconds(['-c', code], runs):.2f} |", flush=True)


if __name__ == "__main__":
    main()
