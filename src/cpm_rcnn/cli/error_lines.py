"""Conversion of an exception to one line for the user."""

import difflib
import errno
import re
from collections.abc import Iterator

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cpm_rcnn.errors import ArgumentError, UnavailableError, UserError
from cpm_rcnn.remote.urls import without_secrets

# Errors of the operating system about a path that the user chose.
_PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


def one_line(error: BaseException) -> str | None:
    """The message for an error caused by user input or by a server, without secrets; None for any other error."""
    message = _message(error)
    return None if message is None else without_secrets(message)


def _message(error: BaseException) -> str | None:
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, (UserError, UnavailableError)):
            return _own_message(str(cause))
    for cause in chain:
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.parent_node is not None:
            return _unknown_key(cause)
    if isinstance(error, InstantiationException):
        # Lightning's Trainer or a logger rejected its arguments; its own message is the most precise. Imported here,
        # because most errors occur before Lightning is imported, which takes seconds.
        from lightning_fabric.utilities.exceptions import MisconfigurationException

        reason = error.__cause__
        theirs = (TypeError, ValueError, ImportError, MisconfigurationException)
        return _join(str(reason)) if isinstance(reason, theirs) else None
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in _PATH_ERRORS and cause.filename:
            return f"{cause.filename}: {cause.strerror}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        # Hydra's text ends with its search path.
        group_name, _, choice = error.missing_cfg_file.rpartition("/")
        file = f"conf/{error.missing_cfg_file}.yaml"
        return f"{group_name}={choice}: there is no {file}; must be one of {', '.join(error.options)}"
    if isinstance(error, HydraException) and (group := re.match(r"Could not override '(\w+)'\. No match", str(error))):
        return f"{group[1]}: the chosen head has no such group"
    if isinstance(error, OverrideParseException):
        key, found, _ = str(error.override).partition("=")
        hint = f"; special characters need quotes inside the shell's, \"{key}='...'\"" if found else ""
        return _join(f"{error.override}: not an override that Hydra can read{hint} ({error})")
    if isinstance(error, OmegaConfBaseException):
        message, key = _without_details(error)
        return f"{key}: {message}"
    if isinstance(error, HydraException):
        reason = error.__cause__
        return _join(
            f"{error}: {_without_details(reason)[0]}" if isinstance(reason, OmegaConfBaseException) else str(error)
        )
    return None


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    key = str(error.full_key)
    parent, _, name = key.rpartition(".")
    allowed = sorted(str(option) for option in error.parent_node)
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{key}: unknown option{hint}; {parent or 'the config'} has {', '.join(allowed) or 'no options'}"


def _without_details(error: OmegaConfBaseException) -> tuple[str, str]:
    """The message of an error of OmegaConf, and the key that it is about, without the lines on the object's type."""
    message, _, details = str(error).partition("full_key: ")
    return _join(message), details.partition("\n")[0]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _own_message(text: str) -> str:
    """The message of one of this project's errors. From a DataLoader worker it arrives at the end of its traceback."""
    for kind in (ArgumentError, UnavailableError, UserError):
        _, found, message = text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")
        if found:
            return _join(message)
    return _join(text)


def _join(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
