"""What the commands share: Hydra around a task, and one line for an error that is the user's to mend."""

import difflib
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator

import hydra
from hydra.errors import HydraException, InstantiationException
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cpm_rcnn.errors import UserError

_PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


def run(task: Callable[[DictConfig], None], config_name: str) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line and call ``task`` with it, once or (``-m``) many times.

    Exits with status 2 and one line on standard error where the user's input is at fault; any other exception is a
    fault of the program and keeps its traceback.
    """
    _hush()
    # Let exceptions through to here, where the user's are told from the program's.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    main = hydra.main(version_base="1.3", config_path="pkg://cpm_rcnn.conf", config_name=config_name)(task)
    try:
        main()
    except Exception as error:
        message = describe(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _hush() -> None:
    """Silence what other libraries say at every run and no user of these commands can act on."""
    # Which devices exist, and advertisements; Lightning's warnings stay.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        # Hydra has made the run folder by then; a run of the same name replaces the last one's log.
        r"Experiment logs directory .* exists and is not empty",
        r".*does not have many workers",
        # The order of the run is a function of the step: the loader starts where it is told.
        r".*dataloader is not resumable",
    ):
        warnings.filterwarnings("ignore", message)


def describe(error: BaseException) -> str | None:
    """One line for an error of the user's; None for any other."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return _own_message(str(cause))
    for cause in chain:
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.parent_node is not None:
            return _unknown_key(cause)
    if isinstance(error, InstantiationException):
        # A part refuses its arguments (Lightning's Trainer, a logger): its own words say it best.
        reason = error.__cause__
        theirs = (TypeError, ValueError, ImportError, MisconfigurationException)
        return _one_line(str(reason)) if isinstance(reason, theirs) else None
    for cause in chain:
        # A folder that may not be written to, a full disk: the place names itself.
        if isinstance(cause, OSError) and cause.errno in _PLACES and cause.filename:
            return f"{cause.filename}: {cause.strerror}"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _one_line(str(error))
    return None


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    key = str(error.full_key)
    parent, _, name = key.rpartition(".")
    allowed = sorted(str(option) for option in error.parent_node)
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{key}: unknown option{hint}; {parent or 'the config'} has {', '.join(allowed)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _own_message(text: str) -> str:
    """The message of a UserError; one from a DataLoader worker comes at the end of that worker's traceback."""
    _, _, message = text.rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")
    return _one_line(message)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
