"""What is wrong with a command of a document: it is parsed as it would be, and not run."""

import argparse
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from cpm_rcnn.cli.arguments import check_choices, normalize, positional_as_option
from cpm_rcnn.cli.assembly import multi_scale_settings
from cpm_rcnn.cli.config import check_added_keys, check_nodes, check_required, overrides_in, to_dict
from cpm_rcnn.cli.error_lines import one_line
from cpm_rcnn.cli.nodes import provisional
from cpm_rcnn.console import COMMANDS
from cpm_rcnn.data.settings import DataSettings
from cpm_rcnn.data.shapes import write_shapes
from cpm_rcnn.errors import UserError
from cpm_rcnn.models.settings import ModelSettings
from cpm_rcnn.remote.urls import is_url
from documents import ROOT

# Options whose values are files of the reader, and what is there in place of them.
_FILES = {"ckpt": "best.ckpt", "src": "released.pth", "source": "a.jpg", "data.root": "data", "annotations": "a.json"}
# Programs that are not this project's.
_OTHER_PROGRAMS = (".", "[", "eval", "exit", "export", "scontrol")


@contextmanager
def without_bodies(folder: Path) -> Iterator[None]:
    """In this context commands can be checked: they check their options, and what follows in ``commands/`` is left out.

    Args:
        folder: an empty folder, which gets the files that commands look for.
    """
    write_shapes(folder / "data", 2, 2)
    for name in ("best.ckpt", "a.jpg", "a.json"):
        (folder / name).touch()
    with pytest.MonkeyPatch.context() as patch, initialize_config_module("cpm_rcnn.conf", version_base="1.3"):
        patch.chdir(folder)
        for name in COMMANDS:
            module = importlib.import_module(f"cpm_rcnn.commands.{name}")
            for function, _ in inspect.getmembers(module, inspect.isfunction):
                patch.setattr(module, function, _check_settings)
        yield


def _check_settings(*arguments: object) -> None:
    """In place of the body of a command: check the settings that it would make."""
    config = next((argument for argument in arguments if isinstance(argument, DictConfig)), None)
    if config is None:
        return
    if "backbone" in config and "schedule" in config and "trainer" in config:
        complete = provisional(config)
        ModelSettings.from_options(to_dict(complete.backbone), **to_dict(complete.detector))
    elif "detector" in config:
        overrides = overrides_in(config.detector)
        # The checkpoint's head is not known.
        ModelSettings.from_options("tiny", head="cascade" if "score_average" in overrides else "cpm", **overrides)
    if "ckpt" in config and "data" in config:
        DataSettings.from_dict(overrides_in(config.data))
    multi_scale_settings(config)


def problem(command: str) -> str | None:
    """What is wrong with a command; None if nothing is. It must be called inside :func:`without_bodies`."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):  # variables of the environment
        del words[0]
    if words and words[0] == "srun":
        del words[0]
    if not words or words[0] in _OTHER_PROGRAMS:
        return None
    program, *rest = words
    if program == "cpm-rcnn" or (program.startswith("python") and rest[:2] == ["-m", "cpm_rcnn"]):
        rest = rest if program == "cpm-rcnn" else rest[2:]
        return _of_package(rest[0], rest[1:]) if rest else None
    if program.startswith("python"):
        return _of_python(rest)
    if program == "make":
        targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
        return None if set(rest) <= set(targets) else f"the Makefile has {targets}"
    if program == "pip":
        return _of_pip(rest)
    if program == "pytest":
        markers = (item.partition(":")[0] for item in _pyproject()["tool"]["pytest"]["ini_options"]["markers"])
        return None if rest == ["-m", *markers] else "no such marker"
    if program.startswith(".ci/"):
        return None if (ROOT / program).is_file() else "no such file"
    return "an unknown program"


def _of_package(name: str, arguments: list[str]) -> str | None:
    """``cpm-rcnn NAME ARGUMENTS``."""
    if name not in COMMANDS:
        return None if name in ("completion", "--version", "--help") else f"no such command: {name}"
    if "--help" in arguments or "--version" in arguments:
        return None
    # "..." stands for options of the reader's, and "[...]" for any options.
    kept = [word for word in arguments if word != "..." and not re.fullmatch(r"\[[A-Z=]+\]", word)]
    if "..." in arguments:
        kept.append("data.root=data")
    return _refusal(name, tuple(map(_with_file, kept)))


@cache
def _refusal(name: str, arguments: tuple[str, ...]) -> str | None:
    """The message with which a command refuses its arguments; None if it accepts them."""
    try:
        _call(name, arguments)
    except Exception as error:
        return one_line(error) or repr(error)
    return None


def _with_file(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={_FILES[key]}" if key in _FILES and value and not is_url(value) else word


def _call(name: str, given: Sequence[str]) -> None:
    """Compose the config of a command and call it, once for a multirun, whose values all occur."""
    flags = ("-m", "--multirun", "--cfg", "job")  # Hydra's
    arguments = [word for word in given if word not in flags and not word.startswith("hydra")]
    arguments = normalize(positional_as_option(arguments, name))
    check_choices(arguments, name)
    overrides = OverridesParser.create().parse_overrides(arguments)
    cells = [_values(override) for override in overrides]
    for k in range(max(map(len, cells), default=1)):
        config = compose(name, [cell[min(k, len(cell) - 1)] for cell in cells], return_hydra_config=True)
        OmegaConf.set_readonly(config.hydra, False)
        config.hydra.mode = "RUN"
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        if "name" in config:
            config.name = "test"  # the time, which only a running Hydra resolves
        check_added_keys(config)
        check_nodes(config)
        check_required(config)
        task = {"eval": "evaluate"}.get(name, name)
        getattr(importlib.import_module(f"cpm_rcnn.{name}"), task)(config)


def _values(override: Override) -> list[str]:
    """An override, or each value of a sweep as one."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if override.is_interval_sweep():
        return [f"{key}={override.value().start}"]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _of_python(arguments: list[str]) -> str | None:
    """``python -m MODULE`` or ``python FILE.py ARGUMENTS``."""
    if arguments[:1] == ["-m"]:
        module = arguments[1]
        if module.startswith("cpm_rcnn.") and module.removeprefix("cpm_rcnn.") in COMMANDS:
            return _of_package(module.removeprefix("cpm_rcnn."), arguments[2:])
        return None if importlib.util.find_spec(module) else "no such module"
    script = ROOT / arguments[0]
    if not script.is_file():
        return None if "/" not in arguments[0] else "no such file"
    return _of_script(script, arguments[1:]) if "argparse" in script.read_text() else None


class _Parsed(BaseException):
    """Ends a script whose arguments have been parsed."""


def _of_script(script: Path, arguments: list[str]) -> str | None:
    """Run a script until its own parser has accepted the arguments."""

    def parse(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        original(parser, arguments)
        raise _Parsed

    def refuse(_: argparse.ArgumentParser, message: str) -> NoReturn:
        raise UserError(message)

    original = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(script.parent)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Parsed:
            return None
        except UserError as error:
            return str(error)
    return "it parses no arguments"


def _of_pip(arguments: list[str]) -> str | None:
    lists = (re.match(r"(?:cpm-rcnn|\.)\[(.+)\]", word) for word in arguments)
    named = {extra for found in lists if found for extra in found[1].split(",")}
    unknown = named - set(_pyproject()["project"]["optional-dependencies"])
    return f"no such extra: {', '.join(sorted(unknown))}" if unknown else None


@cache
def _pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
