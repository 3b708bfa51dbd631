"""The one error that is the user's to mend, and the checks that raise it."""

from collections.abc import Collection
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


def check_choice(key: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise :class:`UserError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(map(str, allowed))}")
