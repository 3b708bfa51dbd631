"""The one error that is the user's to mend, and the checks that raise it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Bad input: a file, key, value or id that the user can mend.

    Its message is one line that names the thing and says what is allowed; commands print it without a
    traceback (``commands.py``).
    """


def check_range(key: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise :class:`UserError` unless ``low <= value <= high``; NaN fails."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        allowed = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
        raise UserError(f"{key}={value}: must be a number, {allowed}")


def check_count(key: str, value: Any, low: int = 1) -> None:
    """Raise :class:`UserError` unless ``value`` is a whole number, at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{key}={value}: must be a whole number, at least {low}")


def check_list(key: str, value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is a list or a tuple."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise UserError(f"{key}={value}: must be a list, for example [{value}]")


def check_choice(key: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise :class:`UserError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(map(str, allowed))}")


def check_keys(key: str, mapping: Mapping[str, Any], allowed: Iterable[str], required: Iterable[str]) -> None:
    """Raise :class:`UserError` unless ``mapping`` has all of the ``required`` keys and none but the ``allowed``."""
    allowed = list(allowed)
    unknown = [name for name in mapping if name not in allowed]
    missing = [name for name in required if name not in mapping]
    for what, names in (("unknown", unknown), ("missing", missing)):
        if names:
            raise UserError(f"{key}: {what} key {', '.join(map(str, names))}; allowed: {', '.join(allowed)}")


def check_flag(key: str, value: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{key}={value}: must be true or false")


def check_path(key: str, value: Any) -> Path:
    """``value`` as a path, ``~`` expanded.

    Raises:
        UserError: it is no text, or no path that the system could have.
    """
    if not isinstance(value, (str, Path)) or not str(value):
        raise UserError(f"{key}={value}: must be a path")
    try:
        path = Path(value).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{key}={value}: no usable path ({getattr(error, 'strerror', None) or error})") from None
    return path


def check_file(key: str, value: Any, allowed: str = "") -> Path:
    """``value`` as the path of a file that is there.

    Args:
        key: the config key, for messages.
        value: the path.
        allowed: what else could have been given, for messages.

    Raises:
        UserError: it is no path, or no file.
    """
    path = check_path(key, value)
    if not path.is_file():
        raise UserError(f"{key}={value}: no such file" + (f"; allowed: {allowed}" if allowed else ""))
    return path
