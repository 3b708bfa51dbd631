"""Stop a training repeatedly, resume it each time, and compare the result with an undisturbed run.

    python benchmarks/interruptions.py [--kills 20] [--workers 0] [--ways kill]
    python benchmarks/interruptions.py --kills 12 --ways ctrl-c sigterm exception full-disk

A small run on drawn shapes writes a checkpoint at every step, so that many kills happen while one is written. Each
process is stopped after a random number of steps and a random fraction of a second; the next one resumes with
resume=auto. At the end, weights, optimizer and schedule must equal those of the undisturbed run bit for bit.

Ways to stop: ``kill`` (SIGKILL), ``ctrl-c`` (SIGINT), ``sigterm``, ``exception`` (a callback raises at a random hook of
a random step), ``full-disk`` (the disk of the run's folder is filled at a random moment; needs root and Linux, because
the folder is then a small file system of its own). For all but ``kill``, the run writes no checkpoint on its own
(``checkpoint_interval`` is high), and the checkpoint that it leaves must be of the last finished step: the steps that
the process has finished are counted by a callback.
"""

import argparse
import contextlib
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

STEPS = 120
RUN = [
    *(sys.executable, "-m", "cpm_rcnn.train", "experiment=quickstart", "data.train_count=40", "data.val_count=4"),
    *(
        f"schedule.max_steps={STEPS}",
        "schedule.milestones=[80,100]",
        "schedule.val_interval=60",
        "schedule.images_per_device=2",
    ),
    *("detector.point_channels=4", "detector.grid_convs=1", "detector.fpn_channels=16", "detector.mlp_channels=16"),
    *("detector.samples=16", "detector.proposals_test=20", "sheet_images=0", "checkpoint_interval=1"),
]


# Counts the finished steps in the file COUNT, and raises an exception if EXCEPTION says so.
COUNTED = """
import os, random
from pathlib import Path
from cpm_rcnn import train
from cpm_rcnn.training.throughput import Throughput
left = int(os.environ["EXCEPTION"] or -1)
hook = random.choice(["on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end"])
def count(self, trainer, *arguments, original=Throughput.on_train_batch_end):
    Path(os.environ["COUNT"]).write_text(str(trainer.global_step))
    original(self, trainer, *arguments)
Throughput.on_train_batch_end = count
def fail(self, *arguments, original=getattr(Throughput, hook)):
    global left
    original(self, *arguments)
    left -= 1
    if left == 0:
        raise RuntimeError("an exception in " + hook)
setattr(Throughput, hook, fail)
train.main()
"""


def start(folder: Path, name: str, workers: int, exception: int | None = None, count: bool = False) -> subprocess.Popen:
    arguments = [*RUN, f"name={name}", "resume=auto", f"data.num_workers={workers}"]
    if count:
        options = [each for each in arguments[3:] if each != "checkpoint_interval=1"]
        arguments = [sys.executable, "-c", COUNTED, *options, "checkpoint_interval=100000"]
    return subprocess.Popen(
        arguments,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"COUNT": str(folder / "count"), "EXCEPTION": str(exception or "")},
    )


def stop(way: str, folder: Path, workers: int) -> bool:
    """Stop a run in one way.

    Returns:
        Whether the checkpoint that it leaves is of the last step that it had finished.
    """
    count, last = folder / "count", folder / "outputs/stopped/checkpoints/last.ckpt"
    before, steps = int(count.read_text() if count.exists() else 0), random.randint(1, 8)
    process = start(folder, "stopped", workers, steps if way == "exception" else None, count=True)
    if way != "exception":
        while process.poll() is None and int((count.exists() and count.read_text()) or 0) < before + steps:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.2))
    filler = folder / "outputs/stopped/filler"
    if way == "full-disk":
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(2**12))
                file.flush()
        time.sleep(random.uniform(0, 0.2))
        # The run ends where it writes its next checkpoint, before a validation at the latest.
    elif way != "exception":
        os.killpg(process.pid, {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM}[way])
    output = process.communicate()[0]
    expected = {"ctrl-c": 130, "sigterm": 143, "exception": 1, "full-disk": 2}[way]
    filler.unlink(missing_ok=True)
    if process.returncode != expected:
        sys.exit(f"{way}: status {process.returncode} instead of {expected}:\n{output}")
    finished, saved = int(count.read_text()), parts(last)[0]
    print(f"{way}: {finished} steps finished, the checkpoint is of step {saved}", flush=True)
    # After a signal, the run finishes one more step, which the callback does not count.
    return saved in ((finished, finished + 1) if way in ("ctrl-c", "sigterm") else (finished,))


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


def stop_in_ways(ways: list[str], stops: int, workers: int, seed: int) -> int:
    random.seed(seed)
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        finish(start(folder, "whole", workers))
        run = folder / "outputs/stopped"
        run.mkdir()
        if "full-disk" in ways:
            size = (folder / "outputs/whole/checkpoints/last.ckpt").stat().st_size
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={6 * size}", "none", run], check=True)
            stack.callback(lambda: subprocess.run(["umount", run], check=True))
        complete: list[bool] = []
        while len(complete) < stops:
            complete.append(stop(ways[len(complete) % len(ways)], folder, workers))
            if parts(run / "checkpoints/last.ckpt")[0] == STEPS:
                print("the run ended before all stops")
                break
        finish(start(folder, "stopped", workers))
        equal = same(
            parts(folder / "outputs/whole/checkpoints/last.ckpt"),
            parts(folder / "outputs/stopped/checkpoints/last.ckpt"),
        )
        saved = f"{sum(complete)} saved the last finished step"
        print(f"{len(complete)} stops ({', '.join(ways)}), {saved}; {workers} workers")
        print("the final state is " + ("the same, bit for bit" if equal else "DIFFERENT"))
        return 0 if equal and all(complete) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    choices = ["kill", "ctrl-c", "sigterm", "exception", "full-disk"]
    parser.add_argument("--ways", nargs="+", choices=choices, default=["kill"])
    options = parser.parse_args()
    if options.ways == ["kill"]:
        sys.exit(main(options.kills, options.workers, options.seed))
    sys.exit(stop_in_ways(options.ways, options.kills, options.workers, options.seed))
