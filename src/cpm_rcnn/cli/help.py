"""``--help``: the groups and options of one command, with the comments of its config."""

from importlib.resources import files

import yaml

# Configs of commands that those of other commands include.
_INCLUDED = ("train",)


def help_text(config_name: str) -> str:
    """What ``--help`` prints: the choices of the command's groups, and its config file, which explains the options.

    Args:
        config_name: name of the command's file in ``conf/``.
    """
    conf = files("cpm_rcnn.conf")
    text = conf.joinpath(f"{config_name}.yaml").read_text("utf-8")
    groups = groups_of(config_name)
    arguments = "RUN RUN ... " if config_name == "compare" else "[GROUP=CHOICE ...] "
    lines = [f"usage: python -m cpm_rcnn.{config_name} {arguments}[OPTION=VALUE ...]", ""]
    if groups:
        lines += ["Groups (GROUP=CHOICE):"]
        for group, default in groups.items():
            lines.append(f"  {group}: {' | '.join(choices(group))}" + (f"  (default {default})" if default else ""))
        lines.append("")
    lines += [
        f"conf/{config_name}.yaml; an option of a node is written NODE.OPTION=VALUE, for example data.root=PATH:",
        "",
        text.rstrip(),
        "",
        "The whole config with a group's options: --cfg job. Help on Hydra itself: --hydra-help.",
    ]
    return "\n".join(lines)


def choices(group: str) -> list[str]:
    """The choices of a config group; empty if there is no such group."""
    folder = files("cpm_rcnn.conf").joinpath(group)
    names = (item.name for item in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def groups_of(config_name: str) -> dict[str, str | None]:
    """The groups of a command, with their default choice.

    Some choices have groups of their own, for example those of ``head``. These are included.
    """
    # "overrides" are options, and "override ..." are choices of Hydra's own groups.
    own = {k: v for k, v in _defaults(f"{config_name}.yaml").items() if not k.startswith("override")}
    nested: dict[str, str | None] = {}
    for group, default in own.items():
        # The default choice first: its defaults are shown.
        for choice in sorted(choices(group), key=lambda name: name != default):
            entries = _defaults(f"{group}/{choice}.yaml").items()
            nested = {k.removeprefix("/"): v for k, v in entries if k.startswith("/")} | nested
    return own | nested


def _defaults(path: str) -> dict[str, str | None]:
    """The groups in the defaults list of a config file and of those that it includes, with their choices."""
    content = yaml.safe_load(files("cpm_rcnn.conf").joinpath(path).read_text("utf-8")) or {}
    found: dict[str, str | None] = {}
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):
            found |= entry
        elif entry in _INCLUDED:
            found |= _defaults(f"{entry}.yaml")
    return found
