"""The one error that is the user's to mend, and the checks that raise it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
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
