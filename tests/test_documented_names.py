"""The options, files, functions and headings that the documents name exist."""

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pkgutil import resolve_name
from typing import Any
from urllib.parse import urlsplit

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from cpm_rcnn.cli.help import choices, groups_of
from cpm_rcnn.console import COMMANDS
from cpm_rcnn.inference import Detector
from documents import DOCUMENTS, ROOT, anchors, by_document, fences, inline_code, links

# Commands with choices that together have all options.
CHOICES = [
    ("train", ["logger=tensorboard"]),
    ("train", ["logger=wandb", "head=faster", "data=custom"]),
    ("train", ["head=cascade", "data=shapes"]),
    ("eval", ["multi_scale=on"]),
    *((name, []) for name in sorted(COMMANDS)),
]
# Arguments of functions, variables of the environment, flags of compilers, keys of Hydra and its plugins.
NOT_OPTIONS = re.compile(r"(weights_only|[A-Z_]+|-.*|\+?hydra[./].*|\+trainer\.NAME)$")
SOURCES = ("benchmarks", "conf", "docs", "kernels", "src", "tests", ".ci")


@pytest.fixture(scope="module")
def options() -> set[str]:
    """The keys of all commands, nodes included, and the groups."""
    with initialize_config_module("cpm_rcnn.conf", version_base="1.3"):
        configs = [compose(name, overrides) for name, overrides in CHOICES]
    contents = (OmegaConf.to_container(config, resolve=False) for config in configs)
    keys = {key for content in contents for key in _keys(content)}
    return keys | {group for name in COMMANDS for group in groups_of(name)}


def _keys(content: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a config, for example ``cmm``, ``cmm.stages`` and ``cmm.stages[0].loss_weight``."""
    entries = content.items() if isinstance(content, dict) else ()
    for key, value in entries:
        name = f"{prefix}{key}"
        yield name
        yield from _keys(value, f"{name}.")
        if isinstance(value, list) and value:
            yield from _keys(value[0], f"{name}[0].")


def _wrong_option(word: str, options: set[str]) -> bool:
    """Whether a word of inline code names an option or the choice of a group, and there is none."""
    key, assigned, value = word.partition("=")
    nodes = {option.partition(".")[0] for option in options if "." in option}
    if not assigned:
        node, _, name = key.partition(".")
        # A Detector in Python.
        attribute = node == "detector" and (hasattr(Detector, name) or f"self.{name}" in inspect.getsource(Detector))
        file = name in ("html", "json", "py", "yaml")
        return node in nodes and name.isidentifier() and key not in options and not attribute and not file
    if NOT_OPTIONS.match(key.lstrip("[")) or not re.fullmatch(r"\+?[\w.\[\]]+", key):
        return False
    # Where the node is clear, a text may leave it out.
    if key not in options and not any(option.endswith(f".{key}") for option in options):
        return True
    concrete = re.fullmatch(r"[a-z][\w*]*(,[\w*]+)*", value)
    return bool(concrete and choices(key)) and not all(_is_choice(key, each) for each in value.split(","))


def _is_choice(group: str, pattern: str) -> bool:
    return any(fnmatch(choice, pattern) for choice in (*choices(group), "true", "false"))


@by_document
def test_the_options_and_choices_exist(document, options):
    wrong = [
        f"{document.name}:{code.line}: {word}"
        for code in inline_code(document)
        if "(" not in code.text
        for word in code.text.split()
        if _wrong_option(word, options)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("word", "wrong"),
    [
        ("data.val_fraction=0.2", False),
        ("val_fraction=0.2", False),
        ("data.val_fractions=0.2", True),
        ("detector.max_grid_rois", False),
        ("detector.max_rois", True),
        ("backbone=*_caffe", False),
        ("backbone=r51", True),
        ("experiment=finetune", False),
        ("experiment=finetuned", True),
        ("sheet_images=3", False),
        ("sheets=3", True),
    ],
)
def test_a_wrong_option_is_found(word, wrong, options):
    assert _wrong_option(word, options) is wrong


def test_the_table_of_groups_has_their_choices():
    rows = re.findall(r"(?m)^\| (`.*?) \| (`.*) \|$", (ROOT / "docs" / "usage.md").read_text("utf-8"))
    listed: dict[str, set[str]] = {}
    for titles, cell in rows:
        names = {f"{start}{each}" for start, inner in re.findall(r"`(\w*)\{(.*?)\}", cell) for each in inner.split(",")}
        for group in re.findall(r"`(\w+)`", titles):
            listed[group] = names | set(re.findall(r"`(\w+)`", cell))
    groups = {group for name in COMMANDS for group in groups_of(name)}
    assert {group: listed.get(group) for group in groups} == {group: set(choices(group)) for group in groups}


def test_the_page_on_installation_has_every_extra_for_users():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    listed = {code.text for code in inline_code(ROOT / "docs" / "install.md")}
    assert set(extras) - {"docs", "test"} <= listed


@cache
def _files() -> list[str]:
    """The files of the repository, each after a slash."""
    return [f"/{path.relative_to(ROOT).as_posix()}" for folder in SOURCES for path in (ROOT / folder).rglob("*")]


@by_document
def test_the_files_and_folders_of_the_repository_exist(document):
    missing = []
    for code in inline_code(document):
        for word in code.text.split():
            word = word.removeprefix("../")
            folder = re.fullmatch(rf"({'|'.join(map(re.escape, SOURCES))})/([\w.-]+/)*", word)
            pattern = f"*/{word}{'*' * bool(folder)}"
            named = folder or re.fullmatch(r"[\w./*-]*\w\.(py|cpp|h)", word)
            if named and not any(fnmatch(name, pattern) for name in _files()):
                missing.append(f"{document.name}:{code.line}: {word}")
    assert not missing


@by_document
def test_the_names_of_the_package_exist(document):
    names = [(code.line, name) for code in inline_code(document) for name in _package_names(code.text)]
    for block in fences(document, "python"):
        names += [(block.line + line - 1, name) for line, name in _used_names(block.text)]
    wrong = [f"{document.name}:{line}: {name}" for line, name in names if not _exists(name)]
    assert not wrong


def _package_names(text: str) -> list[str]:
    """The names of the package in inline code, which may be a call."""
    found = re.match(r"cpm_rcnn(\.\w+)+(?=\(|$)", text)
    return [found[0]] if found else []


def _used_names(code: str) -> Iterator[tuple[int, str]]:
    """The names of the package that a program imports or uses, with their lines; it must be valid Python."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cpm_rcnn":
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("cpm_rcnn"))
        elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith("cpm_rcnn."):
            yield node.lineno, name


def _exists(name: str) -> bool:
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_the_links_to_files_and_headings_lead_somewhere(document):
    wrong = []
    for link in links(document):
        url = urlsplit(link.text)
        if url.scheme or document.suffix == ".txt":  # llms.txt links to pages of the site: the next test
            continue
        target = (document.parent / url.path).resolve() if url.path else document
        exists = target.exists() and (not url.fragment or url.fragment in anchors(target))
        if not exists:
            wrong.append(f"{document.name}:{link.line}: {link.text}")
    assert not wrong


def test_llms_txt_names_pages_of_the_site():
    folder = ROOT / "docs"
    pages = [folder / link.text for link in links(folder / "llms.txt")]
    assert pages
    assert [page for page in pages if not page.with_suffix(".md").is_file()] == []
