"""The cells of a sweep (a multirun of ``train``): their folders, their processes, and the table at the end.

Hydra's launchers call :func:`run_cell` for each combination of values, possibly in other processes or on other
machines. The process that launched the sweep calls :class:`SweepReport` once, after all cells.
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from cpm_rcnn.errors import UserError, shown
from cpm_rcnn.reporting.sweep import MODULES, Cell, read_cell, report_sweep, write_record
from cpm_rcnn.training.signals import SIGNALS

_log = logging.getLogger(__name__)
# At most this many last bytes of what a cell writes to standard error are kept.
_TAIL = 16_384


class SweepReport(Callback):
    """Prints and writes the table of a sweep. ``conf/train.yaml`` names this class, and Hydra instantiates it."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Report all cells in the sweep's folder; exit with status 1 if one of them has no result."""
        # Hydra would turn exceptions into warnings.
        folder = Path(config.hydra.sweep.dir).absolute()
        try:
            results = report_sweep(folder)
        except UserError as error:
            _leave(str(error))
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        print(folder)
        if results.unfinished:
            _leave(f"{len(results.unfinished)} of {len(results.cells)} cells have no result, see above")


def _leave(message: str) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def run_cell(config: DictConfig) -> float | None:
    """Train a cell of a sweep in its own process, so that no process group, logger or memory remains after it.

    A cell that has finished in an earlier launch of the sweep is skipped, and an unfinished one is resumed. A cell that
    fails does not raise: the reason is in its record.

    Args:
        config: the config of the cell.

    Returns:
        The AP of the cell, which a sweeper such as Optuna maximizes; None if the cell failed or its AP is undefined.

    Raises:
        UserError: the folder belongs to another cell.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    overrides = _overrides(hydra)
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    cell = Cell(folder, hydra.job.num, overrides, _choices(hydra), config.seed)
    earlier = read_cell(folder)
    if "overwrite" in given and config.overwrite is True:
        earlier = None
    if earlier is not None and earlier.values != cell.values:
        raise UserError(f"{folder} contains another cell, with {' '.join(earlier.overrides)}; use another sweep=NAME")
    if earlier is not None and earlier.finished:
        print(f"{folder}: has finished already, skipped")
        return _objective(earlier)
    write_record(cell)
    command = [sys.executable, "-m", "cpm_rcnn.train", *overrides, f"hydra.run.dir={_quoted(folder)}"]
    # Their defaults contain the time.
    names = {"sweep": folder.parent.name, "name": folder.name}
    command += [f"{key}={_quoted(value)}" for key, value in names.items() if key not in given]
    if earlier is not None and "resume" not in given:
        command.append("resume=auto")
    try:
        status, tail = run_process(command)
    except (KeyboardInterrupt, SystemExit) as stop:
        reason = "stopped by a signal" if isinstance(stop, SystemExit) else "stopped by SIGINT"
        write_record(replace(cell, status="stopped", error=reason))
        raise
    if status == 0:
        write_record(replace(cell, status="finished"))
        finished = read_cell(folder)
        if finished is not None and finished.finished:
            return _objective(finished)
        status, tail = 1, f"{folder / 'metrics.json'} is missing or damaged"
    stopped = status in [128 + number for number in (*SIGNALS, signal.SIGINT)]
    write_record(replace(cell, status="stopped" if stopped else "failed", error=error_line(status, tail)))
    return None


def _objective(cell: Cell) -> float | None:
    value = cell.metric("AP")
    return None if value != value else value


def _quoted(value: Any) -> str:
    """A value as a quoted string in Hydra's grammar."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", str(value)) + "'"


def _overrides(hydra: Any) -> tuple[str, ...]:
    # Not resolved: an override may contain an interpolation.
    overrides: Any = OmegaConf.to_container(hydra.overrides.task)
    return tuple(overrides)


def _choices(hydra: Any) -> dict[str, str]:
    return {module: shown(hydra.runtime.choices.get(module, "none")) for module in MODULES}


# --- folders ---


def cell_folder(sweep_dir: Path, name: str, overrides: Sequence[str]) -> str:
    """The name of a cell's folder.

    The same cell of an earlier launch of the sweep keeps its folder, also if values were added to the sweep, which
    changes the numbers of the cells.

    Args:
        sweep_dir: the sweep's folder.
        name: the name in a new sweep, which begins with the number of the cell.
        overrides: the overrides of the cell.

    Returns:
        The folder of the cell with these overrides, if there is one; ``name``, if no other cell has it; otherwise
        ``name`` with the next free number.
    """
    values = Cell(sweep_dir, 0, tuple(overrides), {}, None).values
    paths = [path for path in sweep_dir.glob("*") if path.is_dir()]
    for path in paths:
        if (cell := read_cell(path)) is not None and cell.values == values:
            return path.name
    if read_cell(sweep_dir / name) is None:
        return name
    _, _, rest = name.partition("_")
    taken = [int(found[0]) for path in paths if (found := re.match(r"\d+", path.name))]
    for number in range(max(taken) + 1, max(taken) + 10_000):
        with contextlib.suppress(FileExistsError):  # taken by a cell that starts at the same time
            (sweep_dir / f"{number}_{rest}").mkdir()
            return f"{number}_{rest}"
    raise UserError(f"{sweep_dir}: too many cells")


def _resolve_folder(name: str) -> str:
    hydra = HydraConfig.get()
    return cell_folder(Path(hydra.sweep.dir), name, _overrides(hydra))


# Registered on import, so that the processes of all launchers have it: they import this module with the task.
OmegaConf.register_new_resolver("cell_folder", _resolve_folder, replace=True)


# --- processes ---


def run_process(command: Sequence[str]) -> tuple[int, str]:
    """Run a command, show its output, and forward signals to it.

    On a signal that ends this process, the command is given the time to save its state first.

    Returns:
        The exit status, and the end of what it wrote to standard error.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the command has ended. A terminal sends it to the command too.
        SystemExit: another signal, after the command has ended.
    """
    tail = bytearray()
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    reader = threading.Thread(target=_copy, args=(process.stderr, tail), daemon=True)
    reader.start()
    interrupted = False
    with _forwarded(process.send_signal) as received:
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                interrupted = True
    reader.join(5)  # processes that the command left behind can keep the pipe open
    if interrupted:
        raise KeyboardInterrupt
    if received:
        sys.exit(128 + received[0])
    return process.returncode, tail.decode(errors="replace")


def _copy(pipe: BinaryIO, tail: bytearray) -> None:
    """Copy a pipe to standard error, and keep its end."""
    while chunk := os.read(pipe.fileno(), 4096):
        sys.stderr.write(chunk.decode(errors="replace"))
        sys.stderr.flush()
        tail += chunk
        del tail[:-_TAIL]


@contextlib.contextmanager
def _forwarded(send: Callable[[int], None]) -> Iterator[list[int]]:
    """Send the signals in ``SIGNALS`` on; yields the list of those received. Python allows it in the main thread."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        send(number)

    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, note) for number in SIGNALS} if main else {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def error_line(status: int, tail: str) -> str:
    """Why a command failed, in one line.

    Args:
        status: its exit status; negative if a signal ended it.
        tail: the end of what it wrote to standard error.
    """
    if status < 0 or status > 128:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-status if status < 0 else status - 128).name}"
    lines = [line.strip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", tail)) if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {status}"])[-1]
