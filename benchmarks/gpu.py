"""All checks and measurements that need an NVIDIA GPU, in one command.

    python benchmarks/gpu.py [--folder outputs/gpu] [--only NAME ...]

It runs the tests that are marked ``gpu``, the benchmarks of the kernels, training steps and inference with and without
compilation, and trainings of the quickstart. The output of each is a file in the folder; a table says which succeeded.
A check that fails or takes too long does not stop the others. The exit status is 1 if any failed.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@dataclass(frozen=True)
class Check:
    """A command.

    Attributes:
        name: name of the check and of its output file.
        arguments: what Python is called with.
        minutes: after so many it is stopped.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float


def quickstart(name: str, folder: Path, *options: str) -> Check:
    """A training of the quickstart on the GPU."""
    run = ("experiment=quickstart", "trainer.accelerator=gpu", f"hydra.run.dir={folder / name}", "overwrite=true")
    return Check(name, ("-m", "cpm_rcnn.train", *run, *options), 10)


def checks(folder: Path) -> list[Check]:
    """All of them, the quickest first."""
    steps = (str(BENCHMARKS / "steps.py"), "--device", "cuda", "--models", "fused", "cpm", "--bf16", "--optimize")
    return [
        Check("tests", ("-m", "pytest", "-m", "gpu", "-n", "0", str(ROOT / "tests")), 10),
        Check("nms", (str(BENCHMARKS / "nms.py"), "--device", "cuda"), 5),
        Check("deform_conv", (str(BENCHMARKS / "deform_conv.py"), "--device", "cuda"), 10),
        Check("steps", steps, 5),
        Check("steps_compiled", (*steps, "--compile"), 15),
        Check("steps_batch", (*steps, "--vary", "batch", "1", "2", "8"), 10),
        quickstart("quickstart", folder),
        quickstart("quickstart_bf16", folder, "trainer.precision=bf16-mixed"),
        quickstart("quickstart_compiled", folder, "trainer.compile=reduce-overhead"),
    ]


def run(check: Check, folder: Path) -> str:
    """Run a check; its output goes to a file. Returns what the table says of it."""
    with (folder / f"{check.name}.txt").open("w") as output:
        print("$ python", *check.arguments, file=output, flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *check.arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                timeout=60 * check.minutes,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {check.minutes:g} minutes"
    return "ok" if done.returncode == 0 else f"failed with status {done.returncode}"


def main() -> None:
    """Run the checks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of checks")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "error: this machine has no GPU that torch can use\n")
    folder = options.folder.absolute()
    chosen = [check for check in checks(folder) if options.only is None or check.name in options.only]
    if not chosen:
        parser.error(f"--only: the checks are {', '.join(check.name for check in checks(folder))}")
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"{torch.cuda.get_device_name()}, torch {torch.__version__}", title_justify="left")
    for column in ("check", "result", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    results = []
    for check in chosen:
        begun = time.perf_counter()
        results.append(run(check, folder))
        table.add_row(check.name, results[-1], f"{time.perf_counter() - begun:.0f}")
        print(f"{check.name}: {results[-1]}", flush=True)
    Console(width=100).print(table)
    print(folder)
    sys.exit(any(result != "ok" for result in results))


if __name__ == "__main__":
    main()
