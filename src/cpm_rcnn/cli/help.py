"""``--help``: the groups and options of one command, with the comments of its config."""

from collections.abc import Iterator
from importlib.resources import files

import yaml


def help_text(config_name: str) -> str:
    """What ``--help`` prints: the choices of the command's groups, and its config file, which explains the options.

    Args:
        config_name: name of the command's file in ``conf/``.
    """
    conf = files("cpm_rcnn.conf")
    text = conf.joinpath(f"{config_name}.yaml").read_text("utf-8")
    lines = [f"usage: python -m cpm_rcnn.{config_name} [GROUP=CHOICE ...] [OPTION=VALUE ...]", ""]
    if groups := list(_groups(text)):
        lines += ["Groups (GROUP=CHOICE):"]
        for group, default in groups:
            names = (item.name for item in conf.joinpath(group).iterdir())
            choices = sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
            lines.append(f"  {group}: {' | '.join(choices)}" + (f"  (default {default})" if default else ""))
        lines.append("")
    lines += [
        f"conf/{config_name}.yaml; an option of a node is written NODE.OPTION=VALUE, for example data.root=PATH:",
        "",
        text.rstrip(),
        "",
        "The whole config with a group's options: --cfg job. Help on Hydra itself: --hydra-help.",
    ]
    return "\n".join(lines)


def _groups(text: str) -> Iterator[tuple[str, str | None]]:
    """The groups in a config's defaults list, with their default choice."""
    for entry in yaml.safe_load(text)["defaults"]:
        if isinstance(entry, dict):
            ((group, choice),) = entry.items()
            if group != "overrides" and not group.startswith("override "):
                yield group, choice
