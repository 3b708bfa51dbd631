"""Addresses of remote files, and where a file may be: in a local folder or behind a URL."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cpm_rcnn.errors import ArgumentError

# The package that reads files of each scheme.
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_url(value: Any) -> bool:
    """Whether a value is written as a URL, of any scheme."""
    return isinstance(value, str) and _SCHEME.match(value) is not None


def check_url(argument: str, value: Any) -> None:
    """Raise :class:`ArgumentError` if ``value`` is a URL of a scheme that is not supported."""
    match = _SCHEME.match(value) if isinstance(value, str) else None
    if match is not None and match[1] not in PACKAGES:
        raise ArgumentError(
            argument, f"={without_secrets(value)}: must be a local path or start with {'://, '.join(PACKAGES)}://"
        )


def without_secrets(text: str) -> str:
    """A text without what may be secret in the URLs in it: user names, passwords and queries, which may be signatures.

    Args:
        text: a URL, or a message that contains URLs.
    """
    text = re.sub(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]*@", r"\1", text, flags=re.IGNORECASE)
    return re.sub(r"(\bhttps?://[^\s?#'\"]*)[?#][^\s'\"),;]*", r"\1", text, flags=re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class Url:
    """The address of a remote file or folder, with what the code for local paths needs of a :class:`~pathlib.Path`.

    As a string, it has no secrets (:func:`without_secrets`).

    Attributes:
        text: the complete URL.
    """

    text: str

    def __str__(self) -> str:
        return without_secrets(self.text)

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    @property
    def scheme(self) -> str:
        """For example ``s3``."""
        return self.text.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self).rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part of the path without its suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """The suffix of the last part of the path, for example ``.zip``."""
        return Path(self.name).suffix

    def __truediv__(self, name: str) -> "Url":
        """The address of a file in this folder. A query, such as a signature for the whole folder, is kept."""
        if self.scheme not in ("http", "https"):
            return Url(f"{self.text.rstrip('/')}/{name}")
        path, mark, query = self.text.partition("?")
        return Url(f"{path.rstrip('/')}/{quote(name)}{mark}{query}")

    def absolute(self) -> "Url":
        """The same address."""
        return self

    def resolve(self) -> "Url":
        """The same address."""
        return self


Location = Path | Url


def location(text: str) -> Location:
    """The place that a user means by a path, whose ``~`` is expanded, or by a URL."""
    return Url(text) if is_url(text) else Path(text).expanduser()


def join(folder: Location, name: str) -> Location:
    """The place of a file or folder that a path from ``folder``, an absolute path or a URL names."""
    if is_url(name):
        return Url(name)
    if isinstance(folder, Url) and Path(name).is_absolute():
        return Path(name)
    return folder / name
