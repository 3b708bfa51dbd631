"""Kill a training again and again, go on each time, and compare with one that nothing disturbed.

python benchmarks/interruptions.py [--kills 20] [--workers 0]

A small run on drawn shapes saves a checkpoint at every step, so that many kills fall into the writing of one. Each
process is killed (SIGKILL) after a random number of new checkpoints and a random part of a second; the next goes on
with resume=auto. In the end weights, optimizer and schedule must equal the undisturbed run's to the last bit.
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


def start(folder, name, workers):
    arguments = [*RUN, f"name={name}", "resume=auto", f"data.num_workers={workers}"]
    return subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_after_some_checkpoints(process, last):
    """Kill it and its workers; the number of checkpoints that it wrote, or None if it ended by itself before."""
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


def finished(process):
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"a run failed with status {process.returncode}:\n{output}")


def parts(path):
    content = torch.load(path, weights_only=True)
    return content["global_step"], content["state_dict"], content["optimizer_states"], content["lr_schedulers"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(kills, workers, seed):
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        finished(start(folder, "whole", workers))
        last = folder / "outputs/killed/checkpoints/last.ckpt"
        done = halves = 0
        while done < kills:
            process = start(folder, "killed", workers)
            written = kill_after_some_checkpoints(process, last)
            if written is None:
                finished(process)
                print("the run ended before all kills were made")
                break
            done += 1
            halves += last.with_name("last.ckpt.part").exists()
            print(f"kill {done}: {written} checkpoints in", flush=True)
        finished(start(folder, "killed", workers))
        equal = same(parts(folder / "outputs/whole/checkpoints/last.ckpt"), parts(last))
        print(f"{done} kills, {halves} of them within the writing of a checkpoint; {workers} workers")
        print("the end is " + ("the same, to the last bit" if equal else "ANOTHER"))
        return 0 if equal else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.kills, options.workers, options.seed))
