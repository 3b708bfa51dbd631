"""Start several processes as torchrun or SLURM would, each of which calls one function."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

# The processes are forked from a server that has imported everything, which takes seconds, and that has no threads.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["cpm_rcnn.commands.train", "cpm_rcnn.commands.eval", "hotcoco"])


@dataclass
class Outcome:
    """The exit status of a process (-N after signal N), what it printed, and what its function returned."""

    status: int
    out: str
    err: str
    result: Any = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(rank: int, world: int) -> dict[str, Any]:
    """The environment of torchrun's workers on one machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    return ranks | {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "test"}


def slurm(rank: int, world: int) -> dict[str, Any]:
    """The environment of the tasks of a SLURM job with one task per machine."""
    ranks = {"SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_NODEID": rank}
    job = {"SLURM_JOB_ID": 1, "SLURM_JOB_NAME": "test", "SLURM_NODELIST": "127.0.0.1"}
    return ranks | job | {"SLURM_NTASKS": world, "SLURM_NTASKS_PER_NODE": 1, "SLURM_NNODES": world}


def together(
    folder: Path,
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    variables=torchrun,
    timeout=60,
    stopped: Sequence[int] = (),
) -> list[Outcome]:
    """Run ``function(rank, *arguments)`` in ``world`` processes with the environment of ``variables``.

    The test fails if a process is still running after ``timeout`` seconds. Those of ranks ``stopped`` are killed once
    the others have ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(world):
        environment = {name: str(value) for name, value in (rendezvous | variables(rank, world)).items()}
        processes.append(_context.Process(target=_work, args=(rank, environment, folder, function, arguments)))
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for rank, process in enumerate(processes):
        if rank not in stopped:
            process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.exitcode is None and rank not in stopped]
    for process in processes:
        process.kill()
        process.join()
    outcomes = []
    for rank, process in enumerate(processes):
        out, err = ((folder / f"{stream}{rank}").read_text() for stream in ("out", "err"))
        result = folder / f"result{rank}.pt"
        outcomes.append(Outcome(process.exitcode, out, err, torch.load(result) if result.exists() else None))
    assert not hanging, f"ranks {hanging} hang: {[outcome.err[-2000:] for outcome in outcomes]}"
    return outcomes


def _work(rank: int, environment: dict, folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        with (folder / f"{name}{rank}").open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    torch.set_num_threads(1)
    result = function(rank, *arguments)
    torch.save(result, folder / f"result{rank}.pt")


def call(
    rank: int, workplace: Path, faults: dict[int, Callable[[], None]], name: str, *options: str
) -> dict[str, dict[str, Tensor]]:
    """Run the command ``name``; ``faults`` maps a rank to a fault to inject first.

    Returns:
        The process's own weights ``before`` and ``after`` training.
    """
    from cpm_rcnn import eval, train
    from cpm_rcnn.cli import main

    os.chdir(workplace)
    sys.argv = [f"cpm_rcnn.{name}", *options]
    faults.get(rank, lambda: None)()
    weights, fit = {}, pl.Trainer.fit

    def fit_between(trainer: pl.Trainer, module: pl.LightningModule, **arguments: Any) -> None:
        weights["before"] = {name: value.clone() for name, value in module.state_dict().items()}
        fit(trainer, module, **arguments)
        weights["after"] = {name: value.clone() for name, value in module.state_dict().items()}

    pl.Trainer.fit = fit_between
    main.run({"train": train.train, "eval": eval.evaluate}[name], name)
    return weights


@dataclass
class Signal:
    """A fault: this process receives a signal during a step of training, or of the validation after it."""

    number: signal.Signals
    step: int
    hook: str = "training_step"
    stage: str = "fit"

    def __call__(self) -> None:
        from cpm_rcnn.evaluation.module import EvaluationModule
        from cpm_rcnn.training.module import DetectionModule

        owner = EvaluationModule if self.hook in vars(EvaluationModule) else DetectionModule
        original = getattr(owner, self.hook)

        def hook(module: Any, batch: Any, batch_idx: int) -> Any:
            if batch_idx == self.step and module.trainer.state.fn == self.stage:
                os.kill(os.getpid(), self.number)
            return original(module, batch, batch_idx)

        setattr(owner, self.hook, hook)


@dataclass
class Hang:
    """A fault: this process does not return from a training step."""

    step: int

    def __call__(self) -> None:
        from cpm_rcnn.training.module import DetectionModule

        original = DetectionModule.training_step

        def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
            if batch_idx == self.step:
                time.sleep(3600)
            return original(module, batch, batch_idx)

        DetectionModule.training_step = training_step


@dataclass
class OlderBest:
    """A fault and a condition: the best checkpoint is older than the last step, so it is validated after training."""

    fault: Callable[[], None]

    def __call__(self) -> None:
        from cpm_rcnn.training import final_evaluation

        final_evaluation.checkpoint_step = lambda path: -1
        self.fault()


def no_fault() -> None:
    """Nothing."""


@dataclass
class NotANumber:
    """A fault: a loss of this process is NaN at a training step."""

    name: str
    step: int

    def __call__(self) -> None:
        from cpm_rcnn.models.detector import TwoStageDetector

        original, steps = TwoStageDetector.forward, []

        def forward(detector: Any, images: Any, targets: Any = None, **options: Any) -> Any:
            losses = original(detector, images, targets, **options)
            if detector.training:
                if len(steps) == self.step:
                    losses[self.name] = losses[self.name] * float("nan")
                steps.append(len(images))
            return losses

        TwoStageDetector.forward = forward
