"""Command-line arguments before Hydra sees them: forgiving spellings, and checks that Hydra makes too late."""

import os
import re
from collections.abc import Sequence
from pathlib import PurePath

from hydra.core.override_parser.overrides_parser import OverridesParser

from cpm_rcnn.cli.help import choices, groups_of
from cpm_rcnn.errors import UserError
from cpm_rcnn.remote.urls import is_url

# Groups that offer ``on`` and ``off``, for which users also write true and false.
_SWITCHES = ("cmm", "ism", "rsm", "fusion", "multi_scale")
_SPELLINGS = {"true": "on", "yes": "on", "1": "on", "false": "off", "no": "off", "0": "off", "null": "off"}

# Characters that Hydra's grammar does not allow without quotes, or does not take literally.
_SPECIAL = re.compile(r"[^\w\-./:%@+*?|$]", re.ASCII)

# The option that takes the positional arguments of a command.
_POSITIONAL = {"compare": "runs"}
# Hydra's flags that are followed by a value.
_FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--info", "-i", "--experimental-rerun"),
)


def positional_as_option(arguments: Sequence[str], command: str) -> list[str]:
    """The arguments with positional ones, such as paths, as one list-valued option, if the command has such an option.

    An argument with ``=`` is positional if it is the path of a folder or file.

    Args:
        arguments: without the program's name.
        command: name of the command.

    Raises:
        UserError: the option is also given by its name.
    """
    option = _POSITIONAL.get(command)
    if option is None:
        return list(arguments)
    values: list[str] = []
    others: list[str] = []
    for previous, argument in zip(["", *arguments], arguments):
        is_path = "=" not in argument or (not argument.startswith(f"{option}=") and os.path.exists(argument))
        flag = argument.startswith(("-", "+")) or (argument.startswith("~") and not argument.startswith("~/"))
        (values if is_path and not flag and previous not in _FLAGS_WITH_VALUE else others).append(argument)
    if values and any(argument.startswith(f"{option}=") for argument in others):
        raise UserError(f"{values[0]}: give the {option} either as arguments or as {option}=[...], not both")
    return [f"{option}=[{','.join(map(_quoted, values))}]", *others] if values else others


def normalize(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra reads what is meant.

    ``true``, ``false`` and ``null`` are replaced by the choice of a group that they mean. Values that are URLs or the
    paths of existing files or folders are quoted if Hydra's grammar does not allow their characters.

    Args:
        arguments: without the program's name.

    Raises:
        UserError: ``name`` or ``sweep`` is not a name or would put the folder outside ``outputs/``, or the folder of a
            run is a URL.
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
    if key in ("name", "sweep", "hydra.run.dir", "hydra.sweep.dir") and is_url(value):
        raise UserError(f"{key}={value}: the folder of a run must be local; copy it when the run has ended")
    if key in ("name", "sweep"):
        path = PurePath(re.sub(r"^(['\"])(.*)\1$", r"\2", value))
        if path.is_absolute() or ".." in path.parts or not path.parts or value.lower() in ("null", "???"):
            raise UserError(f"{key}={value}: must be a name, or a path inside outputs/ without ..")
        if key == "sweep" and "," in value:
            raise UserError(f"sweep={value}: must be one name, without a comma")
    # A comma in a URL may separate the values of a sweep.
    literal = (is_url(value) and "," not in value) or os.path.exists(os.path.expanduser(value))
    return f"{key}={_quoted(value)}" if literal and _SPECIAL.search(value) and not key.startswith("-") else argument


def _quoted(value: str) -> str:
    """A value in quotes, so that Hydra's grammar does not interpret it."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"


def check_choices(arguments: Sequence[str], command: str) -> None:
    """Refuse groups that a command does not have, and null and numbers as the choice of a group.

    Hydra's own errors about them do not name the group, or advise to add it.

    Args:
        arguments: of the command, as :func:`normalize` returns them.
        command: name of the command.

    Raises:
        UserError: there is such an argument.
    """
    own = groups_of(command)
    for argument in arguments:
        key, found, _ = argument.partition("=")
        group = key.lstrip("+")
        if found and not group:
            raise UserError(f"{argument}: an argument is written KEY=VALUE")
        if not found or not re.fullmatch(r"\w+", group) or not choices(group):
            continue
        if group not in own:
            raise UserError(
                f"{argument}: {command} has no group {group} (its groups: {', '.join(own) or 'none'}); an option of a "
                "node is written NODE.OPTION=VALUE"
            )
        (override,) = OverridesParser.create().parse_overrides([argument])
        value = None if override.is_sweep_override() else override.value()
        none_allowed = override.is_sweep_override() or own[group] is None
        if value == [] or not isinstance(value, (str, list, *([type(None)] if none_allowed else []))):
            raise UserError(f"{argument}: must be one of {', '.join(choices(group))}")
