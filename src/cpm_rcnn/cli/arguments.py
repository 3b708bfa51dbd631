"""Command-line arguments before Hydra sees them: forgiving spellings, and checks that Hydra makes too late."""

import re
from collections.abc import Sequence
from pathlib import PurePath

from cpm_rcnn.errors import UserError

# Groups that offer ``on`` and ``off``, for which users also write true and false.
_SWITCHES = ("cmm", "ism", "rsm", "fusion", "multi_scale")
_SPELLINGS = {"true": "on", "yes": "on", "1": "on", "false": "off", "no": "off", "0": "off", "null": "off"}


def normalize(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``true``, ``false`` and ``null`` replaced by the choice of a group that they mean.

    Args:
        arguments: without the program's name.

    Raises:
        UserError: ``name`` would put the run's folder outside ``outputs/``.
    """
    return [_normalized(argument) for argument in arguments]


def _normalized(argument: str) -> str:
    key, found, value = argument.partition("=")
    if not found:
        return argument
    if key in _SWITCHES:
        # Several values are a sweep of a multirun.
        return f"{key}={','.join(_SPELLINGS.get(part.strip().lower(), part) for part in value.split(','))}"
    if key == "logger" and value.lower() in ("null", "none", "false", "off"):
        return "logger=none"
    if key == "name":
        path = PurePath(re.sub(r"^(['\"])(.*)\1$", r"\2", value))
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"name={value}: must be a name, or a path inside outputs/ without ..")
    return argument
