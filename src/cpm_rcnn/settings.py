"""Settings: frozen dataclasses whose fields declare their default, a check of their value, and what they affect.

Each part of the project has one such dataclass, and each is mirrored by one node of the config. A field is declared
with :func:`architecture`, :func:`training` or :func:`inference`, which say what changes when the value changes:

- *architecture*: the meaning or the shapes of the weights. Two models that differ here cannot share weights.
- *training*: how a model is trained. It may differ between a checkpoint and the run that starts from it.
- *inference*: how a trained model is used. It can be overridden when a checkpoint is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from cpm_rcnn.errors import (
    ArgumentError,
    check_choice,
    check_count,
    check_flag,
    check_keys,
    check_list,
    check_range,
    shown,
)

Check = Callable[[str, Any], None]
_S = TypeVar("_S", bound="Settings")


def architecture(default: Any = MISSING, *, check: Check) -> Any:
    """A field that decides the meaning or the shapes of the weights."""
    return field(default=default, metadata={"check": check, "role": "architecture"})


def training(default: Any = MISSING, *, check: Check) -> Any:
    """A field that decides how a model is trained."""
    return field(default=default, metadata={"check": check, "role": "training"})


def inference(default: Any = MISSING, *, check: Check) -> Any:
    """A field that decides how a trained model is used."""
    return field(default=default, metadata={"check": check, "role": "inference"})


@dataclass(frozen=True)
class Settings:
    """Base of all settings: checks every field when it is constructed.

    Raises:
        ArgumentError: a value has the wrong type or is out of range; the error names the field.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            item.metadata["check"](item.name, value)
            # Lists become tuples, so that settings from a file compare equal to the defaults.
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))

    @classmethod
    def names(cls, role: str | None = None) -> list[str]:
        """Names of the fields, or of those declared with ``role``."""
        return [item.name for item in fields(cls) if role in (None, item.metadata["role"])]

    @classmethod
    def from_dict(cls: type[_S], values: Mapping[str, Any], argument: str | None = None) -> _S:
        """Settings from a mapping of field names to plain values.

        Args:
            values: plain values; fields with a default may be missing.
            argument: name of the mapping. Errors about a value name ``argument.field``, or ``field`` if it is None.

        Raises:
            ArgumentError: a key is unknown or missing, or a value is invalid.
        """
        required = [item.name for item in fields(cls) if item.default is MISSING]
        check_keys(argument, values, cls.names(), required)
        try:
            return cls(**values)
        except ArgumentError as error:
            raise (error.under(argument) if argument else error) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values (numbers, strings, lists, mappings), as checkpoints store them."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    def architecture(self) -> dict[str, Any]:
        """The values that decide the meaning or the shapes of the weights, nested settings as ``name.0.inner``."""
        return self.by_role("architecture")

    def by_role(self, role: str) -> dict[str, Any]:
        """The values of the fields declared with ``role``, nested settings as ``name.0.inner``."""
        found: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            parts = enumerate(value) if _is_list_of_settings(value) else [("", value)]
            for index, part in parts:
                name = f"{item.name}.{index}" if index != "" else item.name
                if isinstance(part, Settings):
                    found |= {f"{name}.{key}": inner for key, inner in part.by_role(role).items()}
                elif item.metadata["role"] == role:
                    found[name] = _plain(part)
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value


def _is_list_of_settings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(part, Settings) for part in value)


# Checks of fields, each a function of the argument's name and its value.


def number(low: float, high: float = float("inf")) -> Check:
    """A number from ``low`` to ``high``."""
    return lambda argument, value: check_range(argument, value, low, high)


def integer(low: int = 1) -> Check:
    """An integer of at least ``low``."""
    return lambda argument, value: check_count(argument, value, low)


def choice(*allowed: Any) -> Check:
    """One of ``allowed``."""
    return lambda argument, value: check_choice(argument, value, allowed)


def flag(argument: str, value: Any) -> None:
    """True or False."""
    check_flag(argument, value)


def text(argument: str, value: Any) -> None:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ArgumentError(argument, f"={shown(value)}: must be a string that is not empty")


def optional(check: Check) -> Check:
    """None, or what ``check`` accepts."""
    return lambda argument, value: None if value is None else check(argument, value)


def list_of(check: Check, length: int | None = None) -> Check:
    """A list whose items ``check`` accepts, with ``length`` items, or at least one if ``length`` is None."""

    def check_all(argument: str, value: Any) -> None:
        check_list(argument, value)
        if length is not None and len(value) != length:
            raise ArgumentError(argument, f"={shown(value)}: must be a list of {length} values")
        if not len(value):
            raise ArgumentError(argument, "=[]: must not be empty")
        for item in value:
            check(argument, item)

    return check_all


def settings_list(kind: type[_S], values: Any, argument: str) -> tuple[_S, ...]:
    """Settings of one kind from a list of mappings; items that are settings already are kept.

    Raises:
        ArgumentError: not a list of valid mappings; the error names the item, for example ``stages[1].loss_weight``.
    """
    check_list(argument, values)
    return tuple(
        value if isinstance(value, kind) else kind.from_dict(value, f"{argument}[{k}]")
        for k, value in enumerate(values)
    )
