"""Requests for remote files, repeated if they fail, stall or return too little."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from cpm_rcnn.errors import UnavailableError, UserError
from cpm_rcnn.remote.urls import PACKAGES, Url, without_secrets

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Seconds before each repetition of a request.
WAITS = (1.0, 4.0, 15.0)
# Seconds without data after which a request has failed, where the library has such an option (s3, http).
STALL = 30.0
# Larger files are read in parts of this many bytes, so that little is lost if one fails.
PART = 32 * 2**20

# What tells versions of a file apart, by the names that the libraries give to it.
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "Digest"),
    *("LastModified", "Last-Modified", "updated", "mtime"),
)
# Answers of a server that a repetition may change: timeout, too early, too many requests, and its own failures.
_TEMPORARY = {408, 425, 429}
# File systems by process and scheme. Those of the process that forked this one cannot be used; they stay, because
# closing them would wait for a thread that this process does not have.
_file_systems: dict[tuple[int, str], Any] = {}


class MissingError(UserError):
    """There is no such remote file."""


class _IncompleteError(Exception):
    """A server has sent fewer or more bytes than the file, or the part of it, has."""


@dataclass(frozen=True)
class RemoteFile:
    """What a server says about a file.

    Attributes:
        url: its address.
        size: in bytes; None if the server does not say it.
        version: a text that changes when the file changes.
    """

    url: Url
    size: int | None
    version: str


def describe(url: Url) -> RemoteFile:
    """Ask the server about a file, with a request that does not transfer it.

    Raises:
        MissingError: there is no such file.
        UnavailableError: the server refuses or does not answer.
        UserError: the package for URLs of this kind is not installed.
    """
    info = _repeated(url, lambda: _file_system(url).info(url.text))
    if info.get("type") == "directory":
        raise MissingError(f"{url}: is a folder, not a file")
    parts = [f"{key}={info[key]}" for key in ("size", *_VERSION_KEYS) if info.get(key) is not None]
    # A file about which nothing is known is never the same again.
    return RemoteFile(url, info.get("size"), " ".join(parts) or f"time={time.time_ns()}")


def fetch(file: RemoteFile, start: int, end: int) -> bytes:
    """The bytes ``start`` to ``end`` of a file, without ``end``.

    Raises:
        MissingError: there is no such file.
        UnavailableError: the server refuses or does not answer, or sends another number of bytes each time.
    """
    return _repeated(file.url, lambda: _part(file, start, end, [end - start]))


def download(file: RemoteFile) -> Iterator[bytes]:
    """The content of a file, in parts.

    Raises:
        MissingError: there is no such file.
        UnavailableError: the server refuses or does not answer, or sends another number of bytes each time.
    """
    url, size = file.url, file.size
    if size is None:
        yield _repeated(url, lambda: _file_system(url).cat_file(url.text))
        return
    position = 0
    while position < size:
        start, end = position, min(position + PART, size)
        # Some servers of http send the whole file whatever part is asked for.
        lengths = [end - start, size] if start == 0 else [end - start]
        content = _repeated(url, lambda: _part(file, start, end, lengths))  # noqa: B023 (called at once)
        yield content
        position += len(content)


def _part(file: RemoteFile, start: int, end: int, lengths: list[int]) -> bytes:
    whole = start == 0 and end == file.size
    limits = {} if whole else {"start": start, "end": end}
    content = _file_system(file.url).cat_file(file.url.text, **limits)
    if len(content) not in lengths:
        if len(content) == file.size:
            raise UserError(f"{file.url}: the server does not send parts of files, which reading this file needs")
        raise _IncompleteError(f"{len(content)} of {lengths[0]} bytes")
    return content


def _repeated(url: Url, request: Callable[[], _T]) -> _T:
    """The result of a request, which is repeated after failures that may be temporary."""
    for attempt, wait in enumerate((*WAITS, None), start=1):
        try:
            return request()
        except UserError:
            raise
        except Exception as error:  # each library has errors of its own
            failure = _origin(error)
            status = _status(failure)
            reason = _reason(failure, status)
            if status in (404, 410) or (status is None and isinstance(failure, FileNotFoundError)):
                raise MissingError(f"{url}: no such file") from error
            if status in (401, 403) or isinstance(failure, PermissionError) or "Credentials" in type(failure).__name__:
                raise UnavailableError(f"{url}: access denied ({reason}); check the credentials") from error
            temporary = status is None or status >= 500 or status in _TEMPORARY
            if wait is None or not temporary:
                times = f" after {attempt} attempts" if attempt > 1 else ""
                raise UnavailableError(f"{url}: cannot be read{times} ({reason})") from error
            _log.info("%s: %s; repeated in %g s", url, reason, wait)
            time.sleep(wait)
    raise AssertionError


def _origin(error: BaseException) -> BaseException:
    """The failure behind an error: fsspec turns any failure of http into FileNotFoundError."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception) and error.errno is None:
        return error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """The status of http of an error of aiohttp, botocore, httpx or gcsfs; None if it has none."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for value in (getattr(each, "status", None), response, getattr(response, "status_code", None)):
            if isinstance(value, int):
                return value
    return None


def _reason(error: BaseException, status: int | None) -> str:
    """A failure in a few words, without secrets."""
    if isinstance(error, _IncompleteError):
        return f"the server sent {error}"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return "the server stalled"
    if status is not None:
        return f"HTTP status {status}"
    first = without_secrets(str(error)).splitlines()[:1]
    return ": ".join([type(error).__name__, *first])


def _file_system(url: Url) -> Any:
    """The file system of a URL in fsspec, made at the first use in each process."""
    key = os.getpid(), url.scheme
    if key not in _file_systems:
        # Imported here: fsspec and the packages behind it take a second, and most runs have no remote file.
        import fsspec

        if any(process != os.getpid() for process, _ in _file_systems):
            fsspec.asyn.reset_lock()  # in a forked process, which has no copy of the thread of the event loop
        try:
            system = fsspec.filesystem(url.scheme, skip_instance_cache=True, **_options(url.scheme))
        except ImportError as error:
            package = PACKAGES[url.scheme]
            raise UserError(f"{url}: needs {package}, which is not installed; pip install {package}") from error
        if url.scheme == "s3":
            system.retries = 1  # s3fs would repeat requests as well
        _file_systems[key] = system
    return _file_systems[key]


def _options(scheme: str) -> dict[str, Any]:
    if scheme == "s3":
        timeouts = {"connect_timeout": STALL, "read_timeout": STALL}
        return {"config_kwargs": {**timeouts, "retries": {"total_max_attempts": 1}}, "use_listings_cache": False}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
        # A compressed answer would have another length than the file.
        return {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}}
    return {}
