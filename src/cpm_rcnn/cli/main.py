"""Run a command under Hydra."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cpm_rcnn.cli.arguments import check_choices, normalize, positional_as_option
from cpm_rcnn.cli.config import check_added_keys, check_nodes, check_required
from cpm_rcnn.cli.error_lines import one_line
from cpm_rcnn.cli.help import help_text
from cpm_rcnn.cli.memory import keep_freed_memory
from cpm_rcnn.errors import UserError


def run(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line and call ``task`` with the result.

    With ``-m`` (multirun), ``task`` is called once per combination of values. What it returns is for Hydra's sweeper.

    An error caused by user input ends the program with status 2 and one line on standard error. Any other exception is
    a defect of the program and keeps its traceback.
    """
    if "--help" in sys.argv[1:]:
        print(help_text(config_name))
        return
    if "--version" in sys.argv[1:]:
        print(f"cpm-rcnn {version('cpm-rcnn')}")
        return
    _silence_libraries()
    # Without it Hydra prints errors itself and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    composed = False

    def checked(config: DictConfig) -> Any:
        check_added_keys(config)
        check_nodes(config)
        check_required(config)
        nonlocal composed
        composed = True
        keep_freed_memory()
        return task(config)

    def leaving_hydra(config: DictConfig) -> Any:
        try:
            return checked(config)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            # Hydra would print a line about an Exception.
            raise _Failure from error

    # Hydra names its job after the function.
    leaving_hydra.__name__, leaving_hydra.__module__ = task.__name__, task.__module__
    main = hydra.main(version_base="1.3", config_path="pkg://cpm_rcnn.conf", config_name=config_name)(leaving_hydra)
    try:
        sys.argv[1:] = normalize(positional_as_option(sys.argv[1:], config_name))
        check_choices(sys.argv[1:], config_name)
        _call(main)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into SystemExit.
        if not any(isinstance(each, KeyboardInterrupt) for each in (stop, stop.__context__)):
            raise
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        message = one_line(error)
        if message is None and not composed:
            # Hydra and OmegaConf raise errors of Python for some overrides.
            message = f"Hydra cannot compose the config of {' '.join(sys.argv[1:])}: {one_line(UserError(str(error)))}"
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


class _Failure(BaseException):
    """Carries an exception of a task, its cause, through Hydra."""


def _call(main: Callable[[], None]) -> None:
    """Call Hydra's main function, and raise what its task has raised."""
    failure = None
    try:
        main()
    except _Failure as caught:
        failure = caught.__cause__
    if failure is not None:
        # Outside of the handler, so that the exception keeps its own cause.
        raise failure


def _silence_libraries() -> None:
    """Silence messages that other libraries print in every run and that a user cannot act on."""
    # Lightning's messages go to standard error. It arranges that itself, but only if no handler exists when it is
    # imported, and Hydra adds one before.
    for name in ("lightning_fabric", "pytorch_lightning"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
            logger.propagate = False
    # Available devices and advertisements; Lightning's warnings stay.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        # Hydra creates the run folder before Lightning's logger looks at it.
        r"Experiment logs directory .* exists and is not empty",
        r".*does not have many workers",
        # The loader needs no state to resume: its order is a function of the step.
        r".*dataloader is not resumable",
        # A run that resumes, maybe with another ``checkpoint_interval``.
        r"Checkpoint directory .* exists and is not empty",
        r".*callbacks used to create the checkpoint need to be provided",
    ):
        warnings.filterwarnings("ignore", message)
