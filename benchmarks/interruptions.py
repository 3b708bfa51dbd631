"""Kill a training repeatedly, resume it each time, and compare the result with an undisturbed run.

    python benchmarks/interruptions.py [--kills 20] [--workers 0]

A small run on synthetic shapes writes a checkpoint at every step, so that many kills happen while one is written. Each
process is killed (SIGKILL) after a random number of new checkpoints and a random fraction of a second; the next one
resumes with resume=auto. At the end, weights, optimizer and schedule must equal those of the undisturbed run bit for
bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RUN = [
    *(sys.executable, "-m", "cpm_rcnn.train", "experiment=quickstart", "data.train_count=40", "data.val_count=4"),
    *(
        "schedule.max_steps=120",
        "schedule.milestones=[80,100]",
        "schedule.val_interval=60",
        "schedule.images_per_device=2",
    ),
    *("detector.point_channels=4", "detector.grid_convs=1", "detector.fpn_channels=16", "detector.mlp_channels=16"),
    *("detector.samples=16", "detector.proposals_test=20", "sheet_images=0", "checkpoint_interval=1"),
]


def start(folder: Path, name: str, workers: int) -> subprocess.Popen:
    arguments = [*RUN, f"name={name}", "resume=auto", f"data.num_workers={workers}"]
    return subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_after_some_checkpoints(process: subprocess.Popen, last: Path) -> int | None:
    """Kill the process and its workers.

    Returns:
        The number of checkpoints that it wrote, or None if it ended before.
    """
    wanted, written = random.randint(1, 5), 0
    before = last.stat().st_mtime_ns if last.exists() else 0
    while written < wanted:
        if process.poll() is not None:
            return None
        now = last.stat().st_mtime_ns if last.exists() else 0
        written, before = written + (now != before), now
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.2))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return written


def finish(process: subprocess.Popen) -> None:
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"a run failed with status {process.returncode}:\n{output}")


def parts(path: Path) -> tuple[Any, ...]:
    content = torch.load(path, weights_only=True)
    return content["global_step"], content["state_dict"], content["optimizer_states"], content["lr_schedulers"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(kills: int, workers: int, seed: int) -> int:
    random.seed(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        finish(start(folder, "whole", workers))
        last = folder / "outputs/killed/checkpoints/last.ckpt"
        done = partial = 0
        while done < kills:
            process = start(folder, "killed", workers)
            written = kill_after_some_checkpoints(process, last)
            if written is None:
                finish(process)
                print("the run ended before all kills")
                break
            done += 1
            partial += last.with_name("last.ckpt.part").exists()
            print(f"kill {done}: {written} checkpoints in", flush=True)
        finish(start(folder, "killed", workers))
        equal = same(parts(folder / "outputs/whole/checkpoints/last.ckpt"), parts(last))
        print(f"{done} kills, {partial} of them while a checkpoint was written; {workers} workers")
        print("the final state is " + ("the same, bit for bit" if equal else "DIFFERENT"))
        return 0 if equal else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.kills, options.workers, options.seed))
