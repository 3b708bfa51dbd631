"""Errors caused by user input, and the checks that raise them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """An error caused by user input: a file, key, value or id that the user can correct.

    Its message is one line that names what is wrong and says what to do. Commands print it without a traceback.
    """


class UnavailableError(Exception):
    """A remote file that cannot be read although it may exist: its server refuses, fails or does not answer.

    It is no :class:`UserError`, so that what skips invalid files does not skip the files of a server that is down. Its
    message is one line, which commands print without a traceback.
    """


class ArgumentError(UserError):
    """An invalid value of a named argument.

    Code that knows which part or config node the argument belongs to adds that name as a prefix with :meth:`under`.

    Args:
        argument: name of the argument, for example ``nms_iou`` or ``stages[0].mapping_ratio``.
        problem: the rest of the message, for example ``=2: must be a number, 0 to 1``.
    """

    def __init__(self, argument: str, problem: str = "") -> None:
        super().__init__(f"{argument}{problem}")
        self.argument = argument
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild the error in another process, as a DataLoader does."""
        return type(self), (self.argument, self.problem)

    def under(self, prefix: str) -> "ArgumentError":
        """The same error for the argument inside ``prefix``."""
        return ArgumentError(f"{prefix}.{self.argument}", self.problem)


def shown(value: Any) -> str:
    """A value as configs and the command line write it: None is null, True is true; lists and mappings likewise."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def check_range(argument: str, value: Any, low: float, high: float = inf) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a finite number with ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value == inf:
        allowed = f"at least {low:g}" if high == inf else f"{low:g} to {high:g}"
        raise ArgumentError(argument, f"={shown(value)}: must be a number, {allowed}")


def check_count(argument: str, value: Any, low: int = 1, high: float = inf) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is an integer with ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        allowed = f"at least {low}" if high == inf else f"{low} to {high}"
        raise ArgumentError(argument, f"={shown(value)}: must be an integer, {allowed}")


def check_list(argument: str, value: Any) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is a list or a tuple."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        example = "" if value is None or isinstance(value, Mapping) else f", for example [{shown(value)}]"
        raise ArgumentError(argument, f"={shown(value)}: must be a list{example}")


def check_choice(argument: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is one of ``allowed``."""
    # Compared with types, so that True is not taken for 1.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ArgumentError(argument, f"={shown(value)}: must be one of {', '.join(map(shown, allowed))}")


def check_flag(argument: str, value: Any) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(argument, f"={shown(value)}: must be true or false")


def check_keys(argument: str | None, mapping: Any, allowed: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raise :class:`ArgumentError` unless ``mapping`` has all ``required`` keys and no key outside ``allowed``.

    Args:
        argument: name of the mapping; None if its keys are themselves the arguments.
        mapping: what to check.
        allowed: the allowed keys.
        required: the keys that must not be missing.
    """
    allowed = list(allowed)
    if not isinstance(mapping, Mapping):
        raise ArgumentError(argument or "settings", f"={shown(mapping)}: must be a mapping with {', '.join(allowed)}")
    unknown = [name for name in mapping if name not in allowed]
    missing = [name for name in required if name not in mapping]
    for what, names in (("unknown", unknown), ("missing", missing)):
        if not names:
            continue
        if argument is None:
            raise ArgumentError(str(names[0]), f": {what} option; allowed: {', '.join(allowed)}")
        raise ArgumentError(argument, f": {what} key {', '.join(map(str, names))}; allowed: {', '.join(allowed)}")


def check_path(argument: str, value: Any) -> Path:
    """``value`` as a path, with ``~`` expanded.

    Raises:
        ArgumentError: ``value`` is not a string or not a valid path on this system.
    """
    if not isinstance(value, (str, Path)) or not str(value):
        raise ArgumentError(argument, f"={shown(value)}: must be a path")
    try:
        path = Path(value).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArgumentError(
            argument, f"={shown(value)}: not a valid path ({getattr(error, 'strerror', None) or error})"
        ) from None
    return path


def check_file(argument: str, value: Any, allowed: str = "") -> Path:
    """``value`` as the path of an existing file.

    Args:
        argument: name of the argument, for messages.
        value: the path.
        allowed: the other values that the argument accepts, for messages.

    Raises:
        ArgumentError: ``value`` is not a path, or there is no such file.
    """
    path = check_path(argument, value)
    if not path.is_file():
        problem = "is a folder, not a file" if path.is_dir() else "no such file"
        raise ArgumentError(argument, f"={value}: {problem}" + (f"; allowed: {allowed}" if allowed else ""))
    return path
