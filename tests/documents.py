"""The Markdown files of the repository and what is in them: commands, code, names of options, links and headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
# The documents that users read; CHANGELOG.md also has commands of earlier versions.
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "docs" / "llms.txt",
]
# A test of each document.
by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
# What inline code starts with if it is a command.
_COMMANDS = re.compile(r"(python3?( -m \S+| \S+\.py)|cpm-rcnn|make|pip|pytest|\.ci/\S+)( |$)")
_SHELL = ("sh", "bash")


@dataclass(frozen=True)
class Snippet:
    """A part of a document, with the number of the line it starts at."""

    text: str
    line: int


@cache
def _tokens(document: Path) -> list[Token]:
    text = document.read_text("utf-8")
    return MarkdownIt("commonmark").enable("table").parse(text)


def _inline(document: Path) -> Iterator[tuple[Token, int]]:
    """The tokens of text with the line of the paragraph or table row that they are in."""
    line = 0
    for token in _tokens(document):
        line = token.map[0] + 1 if token.map else line
        for child in token.children or ():
            yield child, line


def fences(document: Path, *languages: str) -> list[Snippet]:
    """The code blocks in some languages."""
    blocks = (token for token in _tokens(document) if token.type == "fence" and token.info.strip() in languages)
    return [Snippet(token.content, token.map[0] + 2) for token in blocks if token.map]


def inline_code(document: Path) -> list[Snippet]:
    """The texts between backticks."""
    return [Snippet(token.content, line) for token, line in _inline(document) if token.type == "code_inline"]


def commands(document: Path) -> list[Snippet]:
    """The shell commands: each line of the blocks of shell, continued lines as one, and commands between backticks."""
    found = [Snippet(code.text, code.line) for code in inline_code(document) if _COMMANDS.match(code.text)]
    for block in fences(document, *_SHELL):
        lines = iter(enumerate(block.text.splitlines(), block.line))
        for number, text in lines:
            while text.endswith("\\"):
                text = f"{text[:-1]} {next(lines)[1].strip()}"
            if shlex.split(text, comments=True):
                found.append(Snippet(text.strip(), number))
    return found


def links(document: Path) -> list[Snippet]:
    """The targets of links and images."""
    attributes = {"link_open": "href", "image": "src"}
    tokens = ((token, line) for token, line in _inline(document) if token.type in attributes)
    return [Snippet(unquote(str(token.attrs[attributes[token.type]])), line) for token, line in tokens]


def anchors(document: Path) -> set[str]:
    """The names by which links find the headings, as GitHub and MyST make them."""
    found: set[str] = set()
    for start, title in pairwise(_tokens(document)):
        if start.type == "heading_open":
            text = "".join(child.content for child in title.children or () if child.type in ("text", "code_inline"))
            name = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            number = next(k for k in count() if (f"{name}-{k}" if k else name) not in found)
            found.add(f"{name}-{number}" if number else name)
    return found
